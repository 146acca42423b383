"""Tables that scikit-learn ships: beside its StandardScaler, and beside the `adapt` of Keras' Normalization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.preprocessing import StandardScaler

from lightning_revbn import InputNorm
from lightning_revbn.core.input_norm import OnlineStandardizer

Array = NDArray[np.float64]
TABLES: dict[str, Array] = {
    "diabetes": load_diabetes(scaled=False).data,
    "wine": load_wine().data,
    "breast cancer": load_breast_cancer().data,
}


class Adapted:
    """What `keras.layers.Normalization.adapt` and its call compute (keras/src/layers/preprocessing), in float64."""

    def __init__(self, batches: list[Array]) -> None:
        self.mean, self.variance, total = np.zeros(batches[0].shape[1]), np.zeros(batches[0].shape[1]), 0
        for batch in batches:
            total += len(batch)
            share = len(batch) / total
            mean = self.mean * (1 - share) + batch.mean(0) * share
            before = (self.variance + (self.mean - mean) ** 2) * (1 - share)
            self.variance = before + (batch.var(0) + (batch.mean(0) - mean) ** 2) * share
            self.mean = mean

    def __call__(self, values: Array) -> Array:
        return (values - self.mean) / np.maximum(np.sqrt(self.variance), 1e-7)


def learned(table: Array, dtype: torch.dtype = torch.float64, **settings: Any) -> OnlineStandardizer:
    """Return a standardiser that has seen a table in batches of 32."""
    options: dict[str, Any] = {"mode": "running", "scale": 1.0, "eps": 0.0, **settings}
    standardizer = OnlineStandardizer(InputNorm(table.shape[1], **options))
    for batch in torch.tensor(table, dtype=dtype).split(32):
        standardizer.train(batch)
    return standardizer


@pytest.mark.parametrize("mode", ["batch", "running"])
@pytest.mark.parametrize("name", TABLES)
def test_statistics_and_values_are_those_of_scikit_learn_and_keras(name: str, mode: Any) -> None:
    table = TABLES[name]
    standardizer, scaler = learned(table, mode=mode), StandardScaler().fit(table)
    adapted = Adapted([table[start : start + 32] for start in range(0, len(table), 32)])
    mean, std, count = standardizer.statistics()
    assert count.tolist() == [len(table)] * table.shape[1]
    for other_mean, other_variance in ((scaler.mean_, scaler.var_), (adapted.mean, adapted.variance)):
        np.testing.assert_allclose(mean, other_mean, rtol=1e-12)
        np.testing.assert_allclose(std.square(), other_variance, rtol=1e-9)
    values = torch.tensor(table)
    result = standardizer.evaluate(values, dtype=torch.float64)
    for wanted in (scaler.transform(table), adapted(table)):
        np.testing.assert_allclose(result, wanted, rtol=1e-9, atol=1e-9)
    back = standardizer.denormalize(result)
    np.testing.assert_allclose(back, scaler.inverse_transform(result.numpy()), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(standardizer.normalizer()(values), scaler.transform(table), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_float32_keeps_the_precision_of_the_values(name: str) -> None:
    table = TABLES[name].astype(np.float32)
    standardizer, scaler = (
        learned(table.astype(np.float64), torch.float32),
        StandardScaler().fit(table.astype(np.float64)),
    )
    np.testing.assert_allclose(standardizer.statistics().std, scaler.scale_, rtol=1e-9)
    np.testing.assert_allclose(
        standardizer.evaluate(torch.tensor(table)), scaler.transform(table.astype(np.float64)), atol=2e-5
    )


@pytest.mark.parametrize("name", TABLES)
def test_some_columns_and_clipped_outliers_equal_a_column_transformer(name: str) -> None:
    table = TABLES[name]
    chosen = [0, 2, table.shape[1] - 1]
    others = [column for column in range(table.shape[1]) if column not in chosen]
    scaled = ColumnTransformer([("scaled", StandardScaler(), chosen)], remainder="passthrough").fit_transform(table)
    wanted = np.empty_like(table)
    wanted[:, chosen] = scaled[:, :3].clip(-1.5, 1.5)
    wanted[:, others] = scaled[:, 3:]
    standardizer = learned(table, channels=chosen, clip=1.5)
    result = standardizer.evaluate(torch.tensor(table), dtype=torch.float64).numpy()
    assert (np.abs(result[:, chosen]) == 1.5).any()
    np.testing.assert_allclose(result, wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(standardizer.normalizer().double()(torch.tensor(table)), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TABLES)
def test_missing_values_are_left_out_as_scikit_learn_leaves_nan_out(name: str) -> None:
    missing = np.random.default_rng(0).random(TABLES[name].shape) < 0.1
    scaler = StandardScaler().fit(np.where(missing, np.nan, TABLES[name]))
    wanted = np.where(missing, 0.0, scaler.transform(TABLES[name]))
    for hole, settings in ((-9999.0, {"nodata": -9999}), (np.nan, {"nan_policy": "ignore", "fill": 0.0})):
        table = np.where(missing, hole, TABLES[name])
        standardizer = learned(table, **settings)
        np.testing.assert_allclose(standardizer.statistics().std, scaler.scale_, rtol=1e-9)
        result = standardizer.evaluate(torch.tensor(table), dtype=torch.float64)
        np.testing.assert_allclose(result, wanted, rtol=1e-9, atol=1e-9)
