"""The home head: embeddings with a tiny encoder, logistic regression, cross-fitting, files."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from spavl_lib.config import EvaluationConfig
from spavl_lib.errors import InputError
from spavl_lib.evaluation import head
from spavl_lib.evaluation.benchmarks.labels import load_labels
from spavl_lib.evaluation.corrected import corrected_rate
from spavl_lib.evaluation.head import (
    PACKAGE,
    Encoder,
    Head,
    cross_fit,
    embed_answers,
    fit_head,
    fit_logistic,
    opening,
)
from spavl_lib.evaluation.judges import axes_of, check_judge, home_head, judge_records, make_judge
from spavl_lib.evaluation.verdicts import EMPTY
from tests.evaluation.benchmark_files import needs_real_files
from tests.evaluation.test_judge_forms import ATTACKS

WORDS = ["[PAD]", "[UNK]", "no", "sorry", "yes", "sure", "the", "sky", "is", "blue", ".", "!"]
ANSWERS = [
    "no. sorry. the sky. is blue.", "yes! sure.", "", "the sky is blue. yes.",
    "no. sorry. the sky.", "sure the the the sky is is blue blue blue.", "yes! sure.",
    "unseen words here.",
]  # fmt: skip

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="needs the extra judge-head (MiniLM)"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """A BERT of two layers and width 8 with random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return Encoder(folder)


def test_an_opening_ends_at_sentences_and_lines() -> None:
    assert opening("No. I can't. Sorry! Bye.", 1) == "No."
    assert opening("No. I can't. Sorry! Bye.", 3) == "No. I can't. Sorry!"
    assert opening("  First line\n\nsecond line. Third?", 2) == "First line second line."
    assert opening("version 1.5 of it", 1) == "version 1.5 of it"
    assert opening("", 3) == ""


def test_features_are_those_of_single_texts(encoder: Encoder, monkeypatch) -> None:
    monkeypatch.setattr(head, "BATCH", 3)
    texts: list[str] = []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda batch: (texts.extend(batch), encode(batch))[1])
    seen: list[tuple[int, int]] = []
    found = embed_answers(ANSWERS, encoder, progress=lambda done, total: seen.append((done, total)))
    assert found.shape == (8, 16) and found.dtype == np.float32
    assert len(texts) == len(set(texts)) and [len(t) for t in texts] == sorted(map(len, texts))
    assert seen[-1] == (len(texts), len(texts))
    for answer, row in zip(ANSWERS, found, strict=True):
        if not answer:
            assert not row.any()
            continue
        for count, part in ((1, row[:8]), (3, row[8:])):
            alone = encode([opening(answer, count)])[0]
            assert part == pytest.approx(alone, abs=1e-5)
            assert np.linalg.norm(part) == pytest.approx(1, abs=1e-5)
    assert (found[1] == found[6]).all() and not np.allclose(found[1], found[3], atol=1e-3)
    assert embed_answers([], encoder).shape == (0, 16)


def test_an_empty_answer_has_features_of_0(encoder: Encoder) -> None:
    assert not embed_answers(["", " \n"], encoder).any()


def test_a_killed_embedding_goes_on(encoder: Encoder, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(head, "BATCH", 2)
    monkeypatch.setattr(head, "PART", 2)
    whole, encode, calls = embed_answers(ANSWERS, encoder), encoder.encode, []

    def killed(batch: list[str]) -> np.ndarray:
        calls.append(list(batch))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(batch)

    monkeypatch.setattr(encoder, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_answers(ANSWERS, encoder, cache=tmp_path)
    before = [text for batch in calls[:3] for text in batch]
    again = embed_answers(ANSWERS, encoder, cache=tmp_path)
    after = [text for batch in calls[4:] for text in batch]
    assert again == pytest.approx(whole, abs=1e-5)
    assert not set(before) & set(after) and calls[3][0] in after
    calls.clear()
    assert (embed_answers(ANSWERS, encoder, cache=tmp_path) == again).all() and not calls
    [*parts] = (tmp_path / encoder.fingerprint).glob("*.safetensors")
    parts[0].write_bytes(parts[0].read_bytes()[:-7])
    with pytest.raises(InputError, match=f"delete them: .*{parts[0].name}"):
        embed_answers(ANSWERS, encoder, cache=tmp_path)


def test_without_a_model_it_says_how_to_get_one(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match="model.safetensors is missing"):
        Encoder(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"\.\[judge-head\]"):
        Encoder()


@needs_model
def test_the_packaged_model_ranks_sentences_by_meaning() -> None:
    encoder = Encoder()
    one, two, other = encoder.encode(
        ["I cannot help with that.", "Sorry, I am unable to assist.", "The sky is blue today."]
    )
    assert encoder.width == 384 and one @ two > 0.4 > one @ other + 0.1


def points(seed: int, n: int = 80, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width))
    return x, (rng.random(n) < 1 / (1 + np.exp(-2 * x[:, 0] - 0.5))).astype(float)


@pytest.mark.parametrize("width", [5, 120])
def test_the_logistic_fit_is_the_minimum(width: int) -> None:
    """Against scipy's minimiser, with fewer and with more features than rows."""
    x, y = points(0, width=width)
    w = np.random.default_rng(1).uniform(0.5, 2, 80)
    w /= w.mean()

    def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
        margin = x @ beta[:-1] + beta[-1]
        error = w * (1 / (1 + np.exp(-margin)) - y)
        value = w @ (np.logaddexp(0, margin) - y * margin) + 0.15 * beta[:-1] @ beta[:-1]
        return value, np.append(x.T @ error + 0.3 * beta[:-1], error.sum())

    best = minimize(loss, np.zeros(width + 1), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    found = fit_logistic(x, y, weights=5 * w, penalty=0.3)  # the scale of weights does not matter
    assert found.weights == pytest.approx(best[:-1], abs=1e-6)
    assert found.bias == pytest.approx(best[-1], abs=1e-6)
    expected = 1 / (1 + np.exp(-x @ best[:-1] - best[-1]))
    assert found.probabilities(x) == pytest.approx(expected, abs=1e-6)


def test_labels_of_one_kind_give_a_constant() -> None:
    x, _ = points(2)
    found = fit_logistic(x, np.zeros(80)).probabilities(x)
    assert found == pytest.approx(np.full(80, 0.5 / 81))
    with pytest.raises(ValueError, match="label 0 or 1 per row"):
        fit_logistic(x, np.full(80, 0.5))


def test_separable_labels_converge() -> None:
    x = np.linspace(-1, 1, 40)[:, None] * 50
    found = fit_logistic(x, (x[:, 0] > 0).astype(float), penalty=1e-3)
    assert np.isfinite(found.weights).all() and (found.probabilities(x) > 0.5).sum() == 20


def test_cross_fitting_never_reads_a_label_of_the_same_group() -> None:
    x, y = points(3, n=100)
    groups = [i // 2 for i in range(100)]
    labels: list[bool | None] = [bool(v) if i % 3 else None for i, v in enumerate(y)]
    base = cross_fit(x, labels, groups, seed=4)
    for row in (1, 44):
        changed = list(labels)
        changed[row] = not labels[row]
        moved = np.flatnonzero(cross_fit(x, changed, groups, seed=4) != base)
        assert not {row, row ^ 1} & set(moved.tolist()) and len(moved) >= 60
    rows = [i for i, label in enumerate(labels) if label is not None]
    assert ((base[rows] > 0.5) == (y[rows] == 1)).mean() > 0.7
    with pytest.raises(ValueError, match="between 2 and 50 folds"):
        cross_fit(x, labels, groups, folds=51)


def test_a_cross_fitted_head_corrects_and_a_fitted_one_would_lie() -> None:
    """Labels at random: a head learns nothing, but on its own labels it looks perfect."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(600, 200)), (rng.random(600) < 0.4)
    labels = [bool(v) if i < 120 else None for i, v in enumerate(y)]
    honest = corrected_rate(cross_fit(x, labels), labels, target="answers")
    own = fit_logistic(x[:120], y[:120]).probabilities(x)
    lying = corrected_rate(own, labels, target="answers")
    assert honest.corrected.width > 0.85 * honest.people.width
    assert lying.corrected.width < 0.3 * lying.people.width
    assert honest.corrected.ci_low <= y.mean() <= honest.corrected.ci_high


def test_a_head_is_written_and_read(encoder: Encoder, tmp_path: Path) -> None:
    features = embed_answers(ANSWERS, encoder)
    labels = {
        "refused": [True, False, None, False, True, False, False, None],
        "harmful": [False, True, None, None, None, False, True, None],
    }
    made = fit_head(features, labels, encoder.fingerprint)
    path = tmp_path / "judge" / "head.safetensors"
    made.save(path)
    read = Head.load(path, encoder)
    assert read.labels == {"refused": 6, "harmful": 4} and read.encoder == encoder.fingerprint
    for axis, values in made.judge(features).items():
        assert (read.judge(features)[axis] == values).all() and values.shape == (8,)
    assert read.judge(features)["refused"][0] > read.judge(features)["refused"][1]
    assert [p.name for p in path.parent.iterdir()] == ["head.safetensors"]
    other = Head(read.axes, "another-256", read.labels)
    other.save(path)
    with pytest.raises(InputError, match="fitted with the encoder another-256"):
        Head.load(path, encoder)
    path.write_bytes(b"no head")
    with pytest.raises(InputError, match="cannot be read as a home head"):
        Head.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Head.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="harmful: expected at least one label"):
        fit_head(features, {"harmful": [None] * 8}, "x")


def test_a_head_is_a_judge_of_the_axes_it_was_fitted_on(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = embed_answers(ANSWERS, encoder)
    labels = [text.startswith("no") for text in ANSWERS]
    path = tmp_path / "head.safetensors"
    fit_head(features, {"refused": labels}, encoder.fingerprint, penalty=0.001).save(path)
    monkeypatch.setattr(home_head, "Encoder", lambda: encoder)
    settings = EvaluationConfig(judge_model=str(path))
    judge = make_judge("head", {}, settings)
    verdicts = judge_records(judge, [{"response": text} for text in ANSWERS])
    assert axes_of(judge) == ("refused",) and all(v.harmful is None for v in verdicts)
    expected = ["yes" if label else "no" for label in labels]
    assert [v.refused for v in verdicts if not v.why_unjudged] == [
        word for word, text in zip(expected, ANSWERS, strict=True) if text
    ]
    assert verdicts[2].why_unjudged == EMPTY and verdicts[0].score > 0.5
    for model, reason in ((tmp_path, "is a folder"), (tmp_path / "absent", "cannot be read")):
        with pytest.raises(InputError, match=reason):
            check_judge(EvaluationConfig(judge="head", judge_model=str(model)))


@pytest.mark.slow
@needs_real_files
@needs_model
def test_words_to_the_judge_move_at_most_one_verdict_of_thirty() -> None:
    labelled = [a for a in load_labels("msts", allow_changed=True) if a.refused and a.response]
    chosen = random.Random(0).sample(labelled, 430)
    encoder = Encoder()
    seen, new = chosen[:400], chosen[400:]
    features = embed_answers([a.response for a in seen], encoder)
    fit = fit_logistic(features, [a.refused == "yes" for a in seen])

    def verdicts(texts: list[str]) -> np.ndarray:
        return fit.probabilities(embed_answers(texts, encoder)) >= 0.5

    plain = verdicts([a.response for a in new])
    attacked = verdicts([f"{a.response}\n{w}" for a, w in zip(new, ATTACKS, strict=True)])
    assert 5 < plain.sum() < 25 and (plain != attacked).sum() <= 1
