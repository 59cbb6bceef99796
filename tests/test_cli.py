"""The command line as a whole: mistyped words."""

import pytest

from convmixer.cli import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "digits"], "unknown command 'trian': did you mean 'train'?"),
        (["xyzzy"], "unknown command 'xyzzy': choose from benchmark, compare, convert"),
        (["export", "--format", "onx"], "unknown value 'onx': did you mean 'onnx'?"),
        (["train", "digits", "--epoch", "3"], "unknown option '--epoch': did you mean '--epochs'?"),
        (["train", "digits", "--recipe", "digit"], "unknown recipe 'digit': did you mean 'digits'?"),
        (["compare", "mixer"], "unknown study 'mixer': did you mean 'mixers'?"),
    ],
)
def test_a_mistyped_word_names_the_nearest_one(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert said in capsys.readouterr().err
