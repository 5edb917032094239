"""A run in MLflow: its settings as parameters, its numbers as metrics.

``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say where, as everywhere; without the first it is a database in
the run's folder: ``mlflow ui --backend-store-uri sqlite:///RUN/mlflow/mlflow.db``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# Loaded only where --report-to asks for it. MLflow reports its own use to its makers unless told not to beforehand.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from mens_core.observers.scalars import ScalarObserver

__all__ = ["MLflow"]

_STATUS = {"train_complete": "FINISHED", "train_interrupted": "KILLED", "train_stopped": "FAILED"}


class MLflow(ScalarObserver):
    """Logs to an MLflow run of its own."""

    def begin(self) -> None:
        """Begin an MLflow run."""
        place = self.folder.resolve() / "mlflow"
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            place.mkdir(exist_ok=True)
            uri = f"sqlite:///{place / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mens-core")
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self._run = self._client.create_run(experiment, run_name=self.folder.name).info.run_id
        params = [Param(key, value) for key, value in self.settings.items()]
        self._client.log_batch(self._run, params=params)

    def write(self, step: int, ts_ms: int, numbers: Mapping[str, float]) -> None:
        """Log a step."""
        self._client.log_batch(self._run, metrics=[Metric(key, number, ts_ms, step) for key, number in numbers.items()])

    def end(self, ending: str) -> None:
        """End the MLflow run, saying how."""
        self._client.set_terminated(self._run, status=_STATUS[ending])
