"""Tasks while training: the same numbers as the command finds in the checkpoint of the step, in shards too."""

import json
import os
import subprocess
import sys

import pytest

from mamba3_train import evaluate
from mamba3_train.config import compose
from mamba3_train.errors import UserError
from mamba3_train.evaluation import lm_harness
from mamba3_train.training.assembly import build_evaluation

SMALL = [
    "+recipe=quickstart", "data.prepare.automatic=false", "data.sequence_length=32", "data.num_workers=0",
    "data.validation_sequences=4", "model.d_model=32", "model.d_mlp=32", "model.n_layers=2", "model.mixer.head_dim=16",
    "model.mixer.d_state=16", "trainer.max_steps=4", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
    "validation.every_n_steps=0", "checkpoint.every_n_steps=2", "checkpoint.keep_last=2", "report.sample_prompt=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Five texts of different lengths, an odd number for two ranks; and a task that generates."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = ["def f(x):", "import os", "return None", "class A:", "for i in range(10): print(i)"]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    common = f'dataset_path: json\ndataset_kwargs: {{data_files: {{test: "{folder}/lines.jsonl"}}}}\ntest_split: test\n'
    (folder / "lines.yaml").write_text(
        f'task: lines\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{{{text}}}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    (folder / "writing.yaml").write_text(
        f'task: writing\n{common}output_type: generate_until\ndoc_to_text: "{{{{text}}}}"\ndoc_to_target: ""\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


def test_in_shards_and_as_the_command(quickstart_corpus, tasks, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mamba3_train", *SMALL, f"data.path={quickstart_corpus}", f"run.dir={run}"]
    command += ["strategy=fsdp", "trainer.devices=2", "data.micro_batch_size=2", "evaluation.tasks=[lines]"]
    command += ["evaluation.every_n_steps=2", f"evaluation.include_path={tasks}", "evaluation.tokens_per_batch=40"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["eval/lines/bits_per_byte"] for row in rows if "eval/lines/bits_per_byte" in row}
    assert list(found) == [2, 4]
    assert found[2] != found[4]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for step, value in found.items():
        arguments = [f"run={run}", f"step={step}", "tasks=[lines]", f"include_path={tasks}", "device=cpu"]
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments, f"output={tmp_path}/results.json"])
        evaluate.main()
        again = json.loads((tmp_path / "results.json").read_text())["tasks"]["lines"]["bits_per_byte"]
        assert again == pytest.approx(value, rel=1e-5)


def test_what_is_refused_before_training(tasks, monkeypatch):
    assert build_evaluation(compose(*SMALL)) == []
    own = lm_harness.TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr(lm_harness, "TaskManager", lambda **_: own)
    for changes, complaint in (
        (["evaluation.tasks=[lnes]"], "has no task lnes"),
        (["evaluation.tasks=[writing]"], "writing generates text"),
        (["evaluation.tasks=[lines]", "evaluation.limit=0"], "evaluation.limit=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=complaint):
            build_evaluation(compose(*SMALL, f"evaluation.include_path={tasks}", *changes))
