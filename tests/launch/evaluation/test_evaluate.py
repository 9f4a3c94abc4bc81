"""Scores equal an independent computation and the harness's own; the verb as a user runs it."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from launch.evaluation import models, scores, tasks
from launch.evaluation.harness import HarnessModel
from tests.launch.models import huggingface_model
from tests.launch.running import succeeds, torchrun

CPU = torch.device("cpu")


def plain_score(model_folder: Path, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """One answer by transformers alone: no batching, no padding, no sharing, float64 softmax."""
    from transformers import GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM.from_pretrained(model_folder).eval()
    tokens = (context + answer)[-(model.config.max_position_embeddings + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0, -len(answer) :].double()
    chosen = logits.log_softmax(-1)[range(len(answer)), answer]
    return chosen.sum().item(), logits.argmax(-1).tolist() == answer


def test_log_likelihoods_equal_transformers(model, model_folder):
    """Batched by length, answers sharing a pass, one context longer than the model."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, 250, (count,), generator=generator).tolist()

    shared = tokens(20)
    pairs = [(shared, [3]), (shared, [7]), (shared, [9, 4]), (tokens(3), tokens(6))]
    pairs += [(tokens(1), tokens(1)), (tokens(600), tokens(5)), ([*shared, 9], [4])]
    # The greedy answer itself, so that "greedy" is seen true.
    with torch.no_grad():
        best = model.head(model.hidden(torch.tensor([shared]))[0, -1:]).argmax().item()
    pairs.append((shared, [best]))
    for found, (context, answer) in zip(HarnessModel(model, 256).score(pairs), pairs, strict=True):
        likelihood, greedy = plain_score(model_folder, context, answer)
        assert found.log_likelihood == pytest.approx(likelihood, rel=1e-5)
        assert found.greedy is greedy
    assert HarnessModel(model, 256).score(pairs)[-1].greedy


def test_text_too_long_for_a_batch_is_rolled(model):
    """Perplexity of a whole text: every token once, each window's context as long as it can be."""
    text = "abc " * 200  # 800 tokens, 512 positions
    (total,) = HarnessModel(model).loglikelihood_rolling([SimpleNamespace(args=(text,))])
    ids = model.tokenizer.encode(text)
    windows = [([0], ids[:512]), (ids[len(ids) - 513 : 512], ids[512:])]
    windows[0] = ([0], ids[:512])
    expected = sum(s.log_likelihood for s in HarnessModel(model).score(windows))
    assert total == pytest.approx(expected, rel=1e-6)


def test_generation_is_greedy_and_stops(model):
    def generate(settings: dict) -> str:
        request = SimpleNamespace(args=("once upon", settings), task_name="t", doc_id=0)
        return HarnessModel(model).generate_until([request])[0]

    tokens = model.tokenizer.encode("once upon")
    expected = []
    for _ in range(6):
        with torch.no_grad():
            states = model.hidden(torch.tensor([tokens + expected]))
            expected.append(model.head(states[0, -1:]).argmax().item())
    text = model.tokenizer.decode(expected)
    assert generate({"max_gen_toks": 6, "until": ["@@@"]}) == text
    stop = text[2]
    assert generate({"max_gen_toks": 6, "until": [stop]}) == text.split(stop)[0]


def test_generation_reads_each_token_once(model, model_folder):
    """128 tokens, the same as transformers' own greedy search, for a tenth of the work and less."""
    read = []

    def hidden(tokens):
        read.append(tokens.shape[1])
        return model.hidden(tokens)

    prompt = model.tokenizer.encode("once upon a time")
    watched = dataclasses.replace(model, hidden=hidden, end_of_document=-1)
    settings = {"max_gen_toks": 128, "until": ["@@@"]}
    request = SimpleNamespace(args=("once upon a time", settings), task_name="t", doc_id=0)
    (text,) = HarnessModel(watched).generate_until([request])
    assert sum(read) == len(prompt) + 127
    assert sum(len(prompt) + i for i in range(128)) > 10 * sum(read)
    theirs = GPTNeoXForCausalLM.from_pretrained(model_folder)
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=128, do_sample=False)
    assert text == model.tokenizer.decode(ids[0, len(prompt) :].tolist())


def test_a_long_prompt_shortens_the_answer_and_is_never_cut(model):
    def asked(length: int) -> SimpleNamespace:
        return SimpleNamespace(
            args=("a" * length, {"max_gen_toks": 100, "until": ["@@@"]}), task_name="t", doc_id=7
        )

    harness = HarnessModel(dataclasses.replace(model, maximum_length=64, end_of_document=-1))
    (answer,) = harness.generate_until([asked(60)])
    with torch.no_grad():
        states = model.hidden(torch.tensor([model.tokenizer.encode("a" * 60)]))
    first = model.tokenizer.decode([model.head(states[0, -1:]).argmax().item()])
    assert answer.startswith(first)
    assert harness.shortened == {"t": {7}}
    with pytest.raises(ValueError, match="task t, item 7: its prompt of 64 tokens leaves no room"):
        harness.generate_until([asked(5), asked(64)])


def test_cut_prompts_are_counted_by_task_and_shown(model, task_data):
    """An independent count: question and answer of each item against the positions."""
    selection = tasks.select(["sciq"], task_data)
    whole = scores.evaluate(HarnessModel(model), selection)
    assert whole["cut"] == {}
    task = selection.tasks["tasks"]["sciq"]
    longest = [
        max(len(f"{task.doc_to_text(doc)} {choice}") for choice in task.doc_to_choice(doc))
        for doc in task.eval_docs
    ]
    limit = sorted(longest)[len(longest) // 2]
    expected = sum(length > limit + 1 for length in longest)
    assert 0 < expected < len(longest)
    short = dataclasses.replace(model, maximum_length=limit)
    report = scores.evaluate(HarnessModel(short), tasks.select([" sciq "], task_data))
    assert report["cut"] == {"sciq": expected}
    assert f"the prompt lost its beginning: sciq, {expected} of 12" in scores.table(report)


def test_an_answer_without_a_token_is_refused(model):
    request = SimpleNamespace(args=("a question", ""), task_name="t", doc_id=3)
    with pytest.raises(ValueError, match="task t, item 3: an answer without a single token"):
        HarnessModel(model).loglikelihood([request], disable_tqdm=True)


def test_report_has_scores_chance_items_and_versions(model, task_data):
    selection = tasks.select(["sciq"], task_data)
    report = scores.evaluate(HarnessModel(model), selection)
    items = report["items"]["sciq"]
    accuracy = report["results"]["sciq"]["acc"]
    assert items["count"] == 12
    assert sum(items["acc"]) / 12 == pytest.approx(accuracy)
    error = math.sqrt(accuracy * (1 - accuracy) / 11)
    assert report["results"]["sciq"]["acc_stderr"] == pytest.approx(error)
    assert report["chance"]["sciq"] == 0.25
    assert report["versions"]["lm_eval"] == "0.4.13"
    assert report["versions"]["sciq"] == 1.0
    shots = scores.evaluate(HarnessModel(model), tasks.select(["sciq"], task_data), shots=2)
    assert shots["shots"] == {"sciq": 2}
    assert shots["items"]["sciq"]["hash"] == items["hash"]


def test_evaluation_leaves_random_states(model, task_data):
    import random

    import numpy as np

    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    def seed() -> None:
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)

    seed()
    expected = draw()
    seed()
    scores.evaluate(HarnessModel(model), tasks.select(["sciq"], task_data), shots=1)
    assert draw() == expected


def test_scores_are_those_of_the_harness_own_model(shared_data, tmp_path):
    """SciQ, PIQA and LAMBADA, 200 items each, some longer than the model: equal to 1e-6."""
    pytest.importorskip("accelerate", reason="lm-eval's own `hf` model needs it")
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path / "model"
    huggingface_model(folder, positions=1024)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=16)
    ours = HarnessModel(models.from_huggingface(folder, torch.float32, CPU))
    results = []
    for model in (ours, theirs):
        selection = tasks.select(["sciq", "piqa", "lambada_openai"], shared_data / "benchmarks")
        results.append(scores.evaluate(model, selection, limit=200)["results"])
    for task, metrics in results[0].items():
        assert metrics == pytest.approx(results[1][task], rel=1e-6), task


def test_suites_from_local_files(shared_data):
    """The Pythia suite as far as the files go, and all 57 subjects of MMLU with their examples."""
    selection = tasks.select(["pythia", "mmlu"], shared_data / "benchmarks")
    counts = {name: len(task.eval_docs) for name, task in selection.tasks["tasks"].items()}
    official = {"sciq": 1000, "arc_easy": 2376, "arc_challenge": 1172, "piqa": 1838}
    official |= {"lambada_openai": 5153, "logiqa": 651, "wsc": 104}
    assert official.items() <= counts.items()
    subjects = [count for name, count in counts.items() if name.startswith("mmlu_")]
    assert (len(subjects), sum(subjects)) == (57, 14042)
    assert list(selection.skipped) == ["winogrande"]
    anatomy = selection.tasks["tasks"]["mmlu_anatomy"]
    assert len(list(anatomy.fewshot_docs())) == 5


# --- the official numbers ------------------------------------------------------------------------


def test_official_numbers_are_the_published_ones():
    step, found = scores.official("pythia-410m", 5, 14300)
    assert step == 13000
    published = {"sciq": 83.8, "arc_easy": 47.4, "arc_challenge": 20.2, "piqa": 63.3}
    published |= {"lambada_openai": 33.9, "logiqa": 23.3, "winogrande": 50.2, "wsc": 36.5}
    for task, value in published.items():
        assert 100 * found[task]["acc"] == pytest.approx(value, abs=0.051), task
    assert scores.official("pythia-70m", 0, None)[0] == 143000


def test_official_numbers_are_the_whole_source(shared_data):
    records = json.loads((shared_data / "pythia_official_evals.json").read_text())["records"]
    for record in records:
        _, found = scores.official(record["model"], record["num_fewshot"], record["step"])
        assert found["piqa"]["acc"] == record["results"]["piqa"]["acc"]
        assert found["sciq"]["acc_stderr"] == record["results"]["sciq"]["acc_stderr"]
        assert found["mmlu"]["acc"] == record["mmlu_unweighted_mean_acc"]


def test_table_shows_official_scores_errors_and_chance():
    report = {
        "results": {
            "sciq": {"acc": 0.6, "acc_stderr": 0.01, "acc_norm": 0.5, "acc_norm_stderr": 0.02},
            "piqa": {"acc": 0.51, "acc_stderr": 0.01},
            "wsc": {"acc": 0.36, "acc_stderr": 0.047},
            "lambada_openai": {"perplexity": 100.0, "perplexity_stderr": 2.0},
        },
        "chance": {"sciq": 0.25, "piqa": 0.5, "wsc": 0.5},
        "groups": {},
        "skipped": {"winogrande": "no file"},
    }
    step, published = scores.official("pythia-70m", 0, 13000)
    lines = scores.table(report, (f"pythia-70m step {step}", published)).splitlines()
    assert lines[1].split() == ["sciq", "acc", "60.0", "±", "1.0", "65.0", "±", "1.5", "25.0"]
    assert lines[3].endswith("at chance")
    assert lines[4].endswith("below chance")
    assert "100.00 ± 2.00" in lines[5]
    assert lines[-1] == "left out: no file"


# --- the verb ------------------------------------------------------------------------------------


def test_verb_writes_json_and_prints_the_table(model_folder, task_data, tmp_path):
    """Alone and on two processes: the same scores, few-shot prompts included."""
    common = ["--checkpoint", model_folder, "--tasks", "sciq", "--task-data", task_data]
    common += ["--shots", "2"]
    one = succeeds("launch/evaluate.py", *common, "--output", tmp_path / "one.json")
    assert "sciq" in one.stdout
    assert "±" in one.stdout
    torchrun(2, "launch/evaluate.py", *common, "--output", tmp_path / "two.json")
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert first["results"]["sciq"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert second["results"] == first["results"]
    assert second["items"] == first["items"]


def test_mistakes_are_messages(model_folder, task_data, tmp_path):
    from launch.evaluate import main

    def message(*arguments: object) -> str:
        with pytest.raises(ValueError) as caught:
            main([*map(str, arguments)])
        return str(caught.value)

    common = ["--checkpoint", model_folder, "--task-data", task_data]
    assert "did you mean sciq" in message(*common, "--tasks", "sciqq")
    assert "piqa_validation.jsonl" in message(*common, "--tasks", "piqa")
    assert "pythia-70m, pythia-410m" in message(
        *common, "--tasks", "sciq", "--reference", "pythia-1b"
    )
    assert "0 and 5 shots" in message(
        *common, "--tasks", "sciq", "--shots", 1, "--reference", "pythia-70m"
    )
    assert "neither one of our checkpoints" in message(
        "--checkpoint", tmp_path, "--tasks", "sciq", "--task-data", task_data
    )
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in message(
        "--checkpoint", tmp_path / "llama", "--tasks", "sciq", "--task-data", task_data
    )


def test_no_way_to_the_hub(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("Couldn't reach 'allenai/sciq' on the Hub")

    monkeypatch.setattr(tasks.TaskManager, "load", unreachable)
    with pytest.raises(ValueError, match=r"sciq: .*cannot be fetched.*'allenai/sciq'.*--task-data"):
        tasks.select(["sciq"])
