"""Videos: frames at the right moments, labels drawn into a video that plays, and hostile files refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from convmixer.cli import main
from convmixer.errors import RequestError
from convmixer.predict.files import Watching, predict_files
from convmixer.predict.sources import Video
from convmixer.predict.video import frames

av = pytest.importorskip("av", reason="PyAV, the extra `video`, is not installed")
RATE = 10


def scan(index: int) -> Image.Image:
    return Image.fromarray((load_digits().images[index] * 15.9).astype(np.uint8)).resize((64, 64)).convert("RGB")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds: a zero for the first, a one for the second."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(2 * RATE):
            container.mux(stream.encode(av.VideoFrame.from_image(scan(0 if number < RATE else 1))))
        container.mux(stream.encode())
    return path


def test_frames_are_predicted_at_their_moments(
    clip: Path, digits_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    words = ["predict", str(digits_weights), str(clip), "--topk", "1", "--json", "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])["predictions"]
    assert [(p["second"], p["classes"]) for p in found] == [(0.0, ["0"]), (0.5, ["0"]), (1.0, ["1"]), (1.5, ["1"])]
    assert "clip.mp4 at 1.5 s" in said
    assert out.read_text().splitlines()[0] == "file,second,class_1,probability_1,error"


def test_how_often_and_how_long_is_chosen(clip: Path, digits_weights: Path) -> None:
    every = predict_files(digits_weights, [clip], watching=Watching(0.0))["predictions"]
    assert len(every) == 2 * RATE
    first = predict_files(digits_weights, [clip], watching=Watching(0.2, 0.5))["predictions"]
    assert [p["second"] for p in first] == [0.0, 0.2, 0.4]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_labels_are_drawn_into_a_video_that_plays(
    clip: Path, digits_weights: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"labelled{suffix}"
    done = predict_files(digits_weights, [clip], draw=out)
    assert done["drawn"] == [str(out)]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    drawn = list(frames(Video(str(out))))
    assert len(drawn) == 2 * RATE
    assert drawn[-1].second == pytest.approx(1.9, abs=0.02)
    band = np.asarray(drawn[5].image)[-20:]
    assert (band > 200).any()  # letters
    assert np.abs(np.asarray(drawn[15].image)[-60:].astype(int) - np.asarray(drawn[5].image)[-60:]).max() > 100


def test_frames_with_labels_become_pictures(clip: Path, digits_weights: Path, tmp_path: Path) -> None:
    done = predict_files(digits_weights, [clip], draw=tmp_path / "frames", watching=Watching(1.0))
    assert [Path(path).name for path in done["drawn"]] == ["00001-clip-00000.jpg", "00002-clip-00001.jpg"]


def test_a_video_between_images_keeps_its_place(clip: Path, digits_weights: Path, tmp_path: Path) -> None:
    scan(2).save(tmp_path / "two.png")
    arguments = [tmp_path / "two.png", clip, tmp_path / "two.png"]
    found = predict_files(digits_weights, arguments, watching=Watching(5.0))["predictions"]
    assert [Path(p["file"]).name for p in found] == ["two.png", "clip.mp4", "two.png"]


def test_what_is_read_before_damage_counts(clip: Path, digits_weights: Path, tmp_path: Path) -> None:
    whole = clip.read_bytes()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n"
    (tmp_path / "playlist.mp4").write_text(playlist)
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{clip}'\n")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    files = [tmp_path / f"{name}.mp4" for name in ("text", "empty", "playlist", "concat", "cut", "missing")]
    found = predict_files(digits_weights, [*files, clip], watching=Watching(1.0))["predictions"]
    assert ["error" in p for p in found] == [True] * 6 + [False] * 2
    assert "cannot be read as a video" in found[2]["error"]  # a playlist leads nowhere


def test_a_turned_phone_video_is_turned_upright(clip: Path, tmp_path: Path) -> None:
    """The frames are turned by what the file says, as players do."""
    frame = next(iter(frames(Video(str(clip)))))
    assert frame.frame.rotation == 0
    turned = type(frame)(0.0, Turned(frame.frame))
    assert np.array_equal(np.asarray(turned.image), np.asarray(frame.image.rotate(90, expand=True)))


class Turned:
    """A frame of a file that says that it was filmed sideways."""

    rotation = 90

    def __init__(self, frame: object) -> None:
        self.to_image = frame.to_image  # type: ignore[attr-defined]


def test_a_camera_that_is_not_there_is_said(digits_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if Path("/dev/video99").exists():
        pytest.skip("there is a hundredth camera")
    assert main(["predict", str(digits_weights), "camera:99"]) == 2
    assert "camera:99 cannot be opened" in capsys.readouterr().err


def test_the_video_that_is_read_is_not_overwritten(clip: Path, digits_weights: Path) -> None:
    before = clip.read_bytes()
    with pytest.raises(RequestError, match="would overwrite"):
        predict_files(digits_weights, [clip], draw=clip)
    assert clip.read_bytes() == before


def test_bad_times_are_refused(clip: Path, digits_weights: Path) -> None:
    for bad in (["--every", "-1"], ["--every", "nan"], ["--seconds", "0"]):
        assert main(["predict", str(digits_weights), str(clip), *bad]) == 2
