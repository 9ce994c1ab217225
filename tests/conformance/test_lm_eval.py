"""lm-evaluation-harness through the server and over the same weights in Transformers: the same verdicts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

QUIZ = Path(__file__).with_name("quiz.jsonl")
TASK = {
    "task": "anybit_quiz",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(QUIZ)}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    "metadata": {"version": 1},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "quiz.yaml").write_text(json.dumps(TASK))  # JSON is YAML
    return directory


def evaluate(model: str, arguments: str, tasks: Path, output: Path) -> dict[int, dict[str, Any]]:
    """The judged questions by number."""
    command = [
        str(Path(sys.executable).with_name("lm_eval")), "run", "--model", model, "--model_args", arguments,
        "--tasks", "anybit_quiz", "--include_path", str(tasks), "--output_path", str(output), "--log_samples",
        "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    (samples,) = output.rglob("samples_*.jsonl")
    judged = map(json.loads, samples.read_text().splitlines())
    return {question["doc_id"]: question for question in judged}


def test_the_server_gives_the_verdicts_of_transformers(
    server: Any, float_model: Path, tasks: Path, tmp_path: Path
) -> None:
    served = evaluate(
        "local-completions",
        f"model={server.model}@8bit,base_url={server.url}/v1/completions,tokenizer={float_model},"
        "tokenized_requests=True,num_concurrent=8,max_retries=3",
        tasks,
        tmp_path / "served",
    )
    direct = evaluate("hf", f"pretrained={float_model},dtype=float32", tasks, tmp_path / "direct")
    assert served.keys() == direct.keys()
    accuracies = [sum(question["acc"] for question in judged.values()) / len(judged) for judged in (served, direct)]
    differences = []
    for number, question in served.items():
        assert question["acc"] == direct[number]["acc"], question["doc"]
        for got, wanted in zip(question["filtered_resps"], direct[number]["filtered_resps"], strict=True):
            assert got[1] == wanted[1], "one says greedy, the other not"
            differences.append(abs(float(got[0]) - float(wanted[0])))
    print(f"accuracy {accuracies}, largest difference of log probabilities {max(differences):.2g}")
    assert accuracies[0] == accuracies[1] > 0.5
    # Sums over an answer's tokens; the server multiplies activations as fixed point numbers, the judge as float32.
    assert max(differences) < 5e-2
