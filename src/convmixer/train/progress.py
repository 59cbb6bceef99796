"""The progress bar of a run: steps, images per second, time left. It is drawn only on a terminal."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Context that shows a bar.

    Args:
        console: Where to draw it.
        batch_size: Images per step.
    """

    def __init__(self, console: Console, batch_size: int) -> None:
        self.batch_size = batch_size
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[speed]} images/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=None, speed="-")
        self._last: tuple[float, int] | None = None

    def update(self, step: int, done: float) -> None:
        """Show the number of finished steps, and `done`, how far the run is, 0 to 1.

        It may be called after every step: the bar is drawn only a few times per second.
        """
        now, total = time.monotonic(), max(step, round(step / max(done, 1e-6)))
        if self._last is None:
            self._bar.update(self._task, completed=step, total=total)
            self._last = (now, step)
        elif now - self._last[0] > 0.5:
            speed = (step - self._last[1]) * self.batch_size / (now - self._last[0])
            self._bar.update(self._task, completed=step, total=total, speed=f"{speed:.0f}")
            self._last = (now, step)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._bar.stop()
