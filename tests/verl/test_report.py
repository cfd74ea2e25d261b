"""A report from what verl's own loggers leave behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from verl.utils.logger.aggregate_logger import LocalLogger
from verl.utils.tracking import FileLogger

from klplug.report.logs import Log, read

DATA = {
    "actor/kl_loss": np.float64(0.25),
    "critic/score/mean": 0.5,
    "val-core/openai/gsm8k/acc/mean@1": 0.75,
    "actor/grad_norm": 1e-05,
}


def test_the_file_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH", raising=False)
    monkeypatch.setenv("VERL_FILE_LOGGER_ROOT", str(tmp_path))
    logger = FileLogger("project", "experiment")
    for step in (1, 2):
        logger.log(DATA, step)
    logger.finish()
    log = Log()
    read(tmp_path / "project" / "experiment.jsonl", log)
    assert log.problems == []
    assert log.scalars == {tag: {1: value, 2: value} for tag, value in DATA.items()}


def test_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = LocalLogger(print_to_console=True)
    for step in (1, 2):
        logger.log(DATA, step)
    path = tmp_path / "train.log"
    path.write_text(capsys.readouterr().out)
    log = Log()
    read(path, log)
    assert log.scalars == {tag: {1: value, 2: value} for tag, value in DATA.items()}
