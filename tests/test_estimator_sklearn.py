"""scikit-learn's own checks, on images of one row that tables of numbers are reshaped to."""

from typing import Any

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data

from convmixer import ConvMixerClassifier


class OfTables(ConvMixerClassifier):
    """Takes rows of numbers: each becomes an image of one row, black to white as the numbers seen in `fit`."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "OfTables":
        super().fit(self._images(X, reset=True), y, sample_weight)
        return self

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return super()._logits(self._images(X, reset=False))

    def _images(self, X: Any, reset: bool) -> np.ndarray:
        X = validate_data(self, X, reset=reset, dtype=float)
        if reset:
            self._low, self._range = X.min(), max(float(np.ptp(X)), 1e-9)
        return np.round(255 * ((X - self._low) / self._range).clip(0, 1)).astype(np.uint8)[:, None, :, None]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = True, False
        tags.classifier_tags.poor_score = True  # an epoch of a tiny model
        return tags


# one batch holds all rows of the check of weights, so that it may shuffle them
SMALL = OfTables(
    recipe="digits", model="convmixer_8_1_p2_k3", epochs=1, batch_size=64, workers=0, img_size=4, max_bad_fraction=1
)


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([SMALL])
def test_sklearns_checks(estimator: OfTables, check: Any) -> None:
    check(estimator)


def test_tags_tell_the_truth() -> None:
    tags = ConvMixerClassifier().__sklearn_tags__()
    assert tags.estimator_type == "classifier"
    assert (tags.input_tags.two_d_array, tags.input_tags.three_d_array) == (False, True)
    assert tags.classifier_tags.multi_class
    assert not tags.classifier_tags.multi_label
    assert not tags.input_tags.allow_nan
    assert not tags.input_tags.sparse
    assert tags.target_tags.required
