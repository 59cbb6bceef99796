"""Chooses where batches are made: in worker processes of low or normal priority, or in the training process.

Each such choice is called a place. Places are tried while training goes on, because the best one depends on the
images, the model and the other programs on the machine. Batches are the same wherever they are made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from convmixer.processes import usable_cores

TRIAL_SECONDS = 3.0  # a place is judged after this time and a few batches
LONGEST_TRIAL_SECONDS = 10.0  # or after this time, even with fewer batches
WATCH_SECONDS = 20.0  # over how long the speed is measured to notice that it has changed
STARVED = 0.5  # a trial ends early if its speed is below this share of the best speed
WAITING = {"fixed": 0.2, "auto": 0.1}  # share of the time that training may wait before another place is tried
GAIN = 1.05  # more workers are tried only if the last increase made loading faster by this factor
CHANGED = 1.67  # the place is chosen again if the speed has changed by this factor, up or down


@dataclass(frozen=True)
class Place:
    """Where batches are made.

    Args:
        workers: Worker processes; 0: in the training process.
        yields: The workers have the lowest priority. A worker that interrupts one training thread stalls all of them.
    """

    workers: int
    yields: bool = False

    def __str__(self) -> str:
        if not self.workers:
            return "in the training process"
        count = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        return f"by {count}{' at low priority' if self.yields else ''}"


def places(workers: int | str, on_gpu: bool) -> list[Place]:
    """Return the places to try, in order.

    Args:
        workers: The number of worker processes that the user chose, or "auto".
        on_gpu: Training computes on a GPU, so workers do not compete with it for CPU cores.
    """
    if workers == "auto":
        more = [Place(n) for n in (2, 4, 8, 16) if n <= usable_cores()]
        first = [] if on_gpu and more else [Place(0), *([] if on_gpu else [Place(1, yields=True)]), Place(1)]
        return [*first, *more]
    count = int(workers)
    if on_gpu or not count:
        return [Place(count)]
    return [Place(count, yields=True), Place(count), Place(0)]


class Pace:
    """Tries one place after another while training waits too long for its batches, and keeps the fastest.

    Args:
        places: The places to try, the first one at once.
        batch_size: Images in a batch, for the line that is printed.
        climbs: Stop trying as soon as more workers do not help.

    Attributes:
        place: Where the next batches are to be made.
        line: The last decision, in words; "" after `take_line` returned it.
    """

    def __init__(self, places: Sequence[Place], batch_size: int, climbs: bool = False) -> None:
        self.places, self.batch_size, self.climbs = list(places), batch_size, climbs
        self.place, self.line = self.places[0], ""
        self._limit = WAITING["auto" if climbs else "fixed"]
        self._rates: dict[Place, float] = {}  # batches per second of the places tried
        self._share = 0.0
        self._settled = False
        self._batches, self._waited, self._seconds = -1, 0.0, 0.0

    def note(self, waited: float, seconds: float) -> bool:
        """Count a batch, and return whether `place` has changed.

        Args:
            waited: Seconds that training waited for the batch.
            seconds: `waited` plus the seconds that training then took.
        """
        self._batches += 1
        if self._batches <= 0 or len(self.places) == 1:  # the first batch is slow: workers start
            return False
        self._waited, self._seconds = self._waited + waited, self._seconds + seconds
        rate, before = self._batches / self._seconds, self.place
        if not self._is_enough(rate):
            return False
        self._judge(rate, self._waited / self._seconds)
        self._begin()
        return self.place != before

    def _is_enough(self, rate: float) -> bool:
        if self._settled:
            return self._seconds >= WATCH_SECONDS
        starved = rate < STARVED * max(self._rates.values(), default=0)
        many = starved or self._batches >= 4 + 2 * self.place.workers
        return (many and self._seconds >= TRIAL_SECONDS) or self._seconds >= LONGEST_TRIAL_SECONDS

    def patience(self) -> float:
        """Return after how many seconds without a batch a trial ends; 0: never."""
        best = max(self._rates.values(), default=0.0)
        return max(LONGEST_TRIAL_SECONDS, 4 / best) if best and not self._settled else 0.0

    def note_nothing(self, seconds: float) -> None:
        """Note that no batch came in this time, which ends a trial."""
        if not self._settled:
            self._judge(max(self._batches, 0) / (self._seconds + seconds), 1.0)
        self._begin()

    def without_workers(self, reason: str) -> None:
        """Load in the training process from now on; `reason` becomes a part of `line`."""
        self.place, self.places = Place(0), [Place(0)]
        self.line = f"{reason}; images are loaded in the training process from here on"

    def take_line(self) -> str:
        """Return what was decided since the last call, or ""."""
        line, self.line = self.line, ""
        return line

    def _begin(self) -> None:
        self._batches, self._waited, self._seconds = -1, 0.0, 0.0

    def _judge(self, rate: float, share: float) -> None:
        if self._settled:
            old = self._rates[self.place]
            if share <= self._limit or old / CHANGED < rate < old * CHANGED:
                return
            self._rates, self._settled = {}, False
        self._rates[self.place], self._share = rate, share
        untried = [place for place in self.places if place not in self._rates]
        others = [r for place, r in self._rates.items() if place != self.place]
        more = self.place.workers > 1 and not self.place.yields
        top = self.climbs and more and rate < GAIN * max(others, default=0)
        if share > self._limit and untried and not top:
            self.place = untried[0]
            return
        self._settled = True
        self.place = max(self._rates, key=self._rates.__getitem__)
        best = self._rates[self.place]
        if any(place.yields and rate < STARVED * best for place, rate in self._rates.items()):
            self.places = [place for place in self.places if not place.yields]  # other programs run: not tried again
        if len(self._rates) > 1 or self.climbs:
            self.line = self._in_words()

    def _in_words(self) -> str:
        speeds = {place: f"{rate * self.batch_size:.0f}" for place, rate in self._rates.items()}
        others = ", ".join(f"{place}: {speed}" for place, speed in speeds.items() if place != self.place)
        text = f"images are loaded {self.place}: {speeds[self.place]} images/s"
        return f"{text} ({others})" if others else f"{text}, waiting {self._share:.0%} of the time"
