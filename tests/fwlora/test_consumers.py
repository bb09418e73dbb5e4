"""What PEFT, vLLM and llama.cpp make of an exported adapter, by their own loading rules.

PEFT's loader is called. The other two are rewritten here from their source, which each oracle names: a build of vLLM or
llama.cpp is far too large for a test, and PyPI's `gguf` lacks the converter.

pytest tests/fwlora/test_consumers.py
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from small_models import lora_net
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import fwlora
from fwlora.output_change import output_change

VOCABULARY, RESIZED = 20, 23
IDS = torch.arange(14).reshape(2, 7)


def settings(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text())


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors")


def delta(layer: Any) -> Tensor:
    return layer.get_delta_weight("default").detach()


# ---- PEFT: its own save is the oracle ------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., Any]:
    """`base(cls, tied, resized, seed)`: a tiny Llama of the same files each time; new rows are random."""

    def load(cls: Any = LlamaForCausalLM, tied: bool = False, resized: bool = False, seed: int = 0) -> Any:
        folder = tmp_path / f"base-{cls.__name__}-{tied}"
        if not folder.exists():
            torch.manual_seed(1)
            config = LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                tie_word_embeddings=tied,
                pad_token_id=0,
            )
            cls(config).save_pretrained(folder)
        model = cls.from_pretrained(folder)
        torch.manual_seed(seed)
        if resized:
            model.resize_token_embeddings(RESIZED, mean_resizing=False)
        return model

    return load


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora, patterns": dict(
        use_rslora=True, r=3, lora_alpha=7, rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 1}
    ),
    "resized": dict(resized=True),
    "resized, tied": dict(resized=True, tied=True),
    "classifier": dict(cls=LlamaForSequenceClassification, task_type=TaskType.SEQ_CLS),
    "no task": dict(task_type=None),
    "layers repeated": dict(layer_replication=[(0, 2), (1, 2)]),
    "tokens": dict(trainable_token_indices=[1, 3]),
    "tokens, tied": dict(trainable_token_indices=[1, 3], tied=True),
    "embeddings trained": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "embeddings trained, tied": dict(modules_to_save=["embed_tokens"], tied=True, ensure_weight_tying=True),
    "output layer adapted": dict(target_modules=["q_proj", "lm_head"]),
    "one layer": dict(layers_to_transform=[1]),
    "another initialization": dict(init_lora_weights="gaussian"),
}


def adapted(base: Callable[..., Any], case: dict[str, Any]) -> Any:
    """A PEFT model in which all that is trainable has moved."""
    own = {key: case[key] for key in ("cls", "tied", "resized") if key in case}
    lora = dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM)
    lora |= {key: value for key, value in case.items() if key not in own}
    model = get_peft_model(base(**own), LoraConfig(**lora))
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.3)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore")  # PEFT's: about embeddings that are saved, tied weights, repeated layers
@pytest.mark.parametrize("name", CASES)
def test_peft_reads_the_same_as_from_its_own_save(tmp_path: Path, base: Callable[..., Any], name: str) -> None:
    case = CASES[name]
    model = adapted(base, case)
    model.save_pretrained(str(tmp_path / "peft"))
    fwlora.export_adapter(model, tmp_path / "ours")
    again = {key: case[key] for key in ("cls", "tied", "resized") if key in case}
    predicted = []
    for folder in ("peft", "ours"):
        loaded = PeftModel.from_pretrained(base(**again, seed=5), str(tmp_path / folder)).eval()
        predicted.append(logits(loaded))
    assert torch.equal(predicted[0], predicted[1]), "the difference must be 0.0"
    assert_close(predicted[1], logits(model))
    with model.disable_adapter():
        assert not torch.allclose(logits(model), predicted[1], atol=1e-3)

    ours, pefts = tensors(tmp_path / "ours"), tensors(tmp_path / "peft")
    assert set(ours) == set(pefts) and all(torch.equal(ours[key], pefts[key]) for key in pefts)
    mine, its = settings(tmp_path / "ours"), settings(tmp_path / "peft")
    stated = "target_modules rank_pattern alpha_pattern r lora_alpha layers_to_transform init_lora_weights".split()
    for key in set(its) - set(stated):
        assert mine[key] == its[key] or sorted(mine[key]) == sorted(its[key]), key
    if name == "no task":
        assert mine["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    if name == "layers repeated":
        assert mine["layer_replication"] == [[0, 2], [1, 2]]


def test_embeddings_are_written_where_the_caller_says_so(tmp_path: Path, base: Callable[..., Any]) -> None:
    """A model made from a config has no files to compare its vocabulary with."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(base().config)
    made.name_or_path = ""
    model = get_peft_model(made, LoraConfig(target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM))
    embedding = "base_model.model.model.embed_tokens.weight"
    for save, there in (("auto", False), (True, True), (False, False)):
        fwlora.export_adapter(model, tmp_path / "a", save_embedding_layers=save)
        assert (embedding in tensors(tmp_path / "a")) is there


def test_the_hub_is_not_asked_for_a_vocabulary_that_is_here(
    tmp_path: Path, base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    fwlora.export_adapter(adapted(base, {}), tmp_path / "a")


def test_a_class_of_ones_own_is_named_for_auto_loading(tmp_path: Path) -> None:
    model = lora_net()
    model.save_pretrained(str(tmp_path / "peft"))
    fwlora.export_adapter(model, tmp_path / "ours")
    mapping = settings(tmp_path / "ours")["auto_mapping"]
    assert mapping == settings(tmp_path / "peft")["auto_mapping"]
    assert mapping == {"base_model_class": "Net", "parent_library": "small_models"}


# ---- vLLM ----------------------------------------------------------------------------------------------------------


def vllm_deltas(path: Path) -> dict[str, Tensor]:
    """What vLLM adds to each weight, by module."""
    config = settings(path)
    # vllm/lora/peft_helper.py: _validate_features, validate_legal and __post_init__.
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"
    assert not config.get("trainable_token_indices")
    # vllm/config/lora.py: MaxLoRARanks. The server is started with the first that is large enough.
    slot = next(rank for rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) if rank >= config["r"])
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors(path).items():
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        # vllm/lora/utils.py: parse_fine_tuned_lora_name, which raises for any other name.
        parts = name.removeprefix("base_model.model.").split(".")
        assert name.startswith("base_model.model.") and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
        found.setdefault(".".join(parts[:-2]), {})[parts[-2]] = tensor
    # vllm/lora/lora_weights.py: pack_moe stacks the experts' matrices, and misses none.
    for module in found:
        if ".experts." in module:
            head, tail = module.split(".experts.")
            last = tail.partition(".")[2]
            torch.stack([found[f"{head}.experts.{i}.{last}"]["lora_A"] for i in range(EXPERTS)])
    deltas = {}
    for module, pair in found.items():
        # vllm/lora/layers/base_linear.py: set_lora copies into slots of zeros; optimize() has scaled B before.
        a, b = torch.zeros(slot, pair["lora_A"].shape[1]), torch.zeros(pair["lora_B"].shape[0], slot)
        a[: pair["lora_A"].shape[0]] = pair["lora_A"]
        b[:, : pair["lora_B"].shape[1]] = pair["lora_B"] * scaling
        deltas[module] = b @ a
    return deltas


# ---- llama.cpp -----------------------------------------------------------------------------------------------------


def llama_cpp_deltas(path: Path) -> dict[str, Tensor]:
    """What llama.cpp adds to each weight, by module."""
    # convert_lora_to_gguf.py: lparams["lora_alpha"] and nothing else of the config; stored as float32.
    alpha = torch.tensor(settings(path)["lora_alpha"], dtype=torch.float32)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors(path).items():
        if ".base_layer.weight" in name:
            continue
        # get_tensors() ends the program for any other name; get_base_tensor_name().
        assert ".lora_A.weight" in name or ".lora_B.weight" in name, f"Unexpected name {name}"
        module = name.replace("base_model.model.", "").replace(".lora_A.weight", "").replace(".lora_B.weight", "")
        found.setdefault(module, {})[name.split(".")[-2]] = tensor
    for module in found:
        if ".experts." in module:  # modify_tensors of the models with experts: torch.stack over all of them
            head, tail = module.split(".experts.")
            last = tail.partition(".")[2]
            torch.stack([found[f"{head}.experts.{i}.{last}"]["lora_A"] for i in range(EXPERTS)])
    # src/llama-adapter.h: get_scale(), rank = b->ne[0]
    return {module: alpha / p["lora_B"].shape[1] * (p["lora_B"] @ p["lora_A"]) for module, p in found.items()}


ORACLES = {"vllm": vllm_deltas, "llama.cpp": llama_cpp_deltas}
EXPERTS = 3


@pytest.mark.parametrize("consumer", ORACLES)
@pytest.mark.parametrize("asked", [{}, {"ranks": {"model.layers.0.self_attn.q_proj": 1}}, {"budget": 150}])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("name", ["plain", "rslora, patterns"])
def test_each_consumer_adds_what_the_model_adds(
    tmp_path: Path, base: Callable[..., Any], consumer: Any, asked: dict[str, Any], scale: float | None, name: str
) -> None:
    """Ranks of the file: 1, 2, 3 and 5, and matrices left out."""
    model = adapted(base, CASES[name])
    path = tmp_path / "a"
    report = fwlora.export_adapter(model, path, for_=consumer, scale=scale, **asked)
    found = ORACLES[consumer](path)
    assert set(found) == {module for module, rank in report.ranks.items() if rank}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(base(), str(path))
    for module, rank in report.ranks.items():
        whole = delta(model.get_base_model().get_submodule(module))
        u, sigma, v = torch.linalg.svd(whole, full_matrices=False)
        nearest = (u[:, :rank] * sigma[:rank]) @ v[:rank]
        if rank:
            assert_close(found[module], nearest, rtol=1e-4, atol=1e-5)
            assert_close(delta(loaded.get_base_model().get_submodule(module)), nearest, rtol=1e-4, atol=1e-5)
            assert len(tensors(path)[f"base_model.model.{module}.lora_A.weight"]) == rank, "no padding"


def test_peft_s_file_would_be_misread_by_both(tmp_path: Path, base: Callable[..., Any]) -> None:
    """The oracles see what for_ is there for."""
    model = adapted(base, {"alpha_pattern": {"q_proj": 12}, "rank_pattern": {"v_proj": 4}})
    fwlora.export_adapter(model, tmp_path / "a")
    module = "model.layers.1.self_attn.q_proj"
    right = delta(model.get_base_model().get_submodule(module))
    for oracle in ORACLES.values():
        assert not torch.allclose(oracle(tmp_path / "a")[module], right, rtol=0.1)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6)}) for _ in range(EXPERTS))
        self.out = nn.Linear(4, 4)


@pytest.mark.parametrize("consumer", ORACLES)
def test_experts_get_equal_ranks(tmp_path: Path, consumer: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.ModuleDict({"mlp": Experts()}), LoraConfig(r=3, target_modules=["up", "out"], init_lora_weights=False)
    )
    names = [f"mlp.experts.{i}.up" for i in range(EXPERTS)]
    report = fwlora.export_adapter(
        model, tmp_path / "a", for_=consumer, ranks={names[0]: 1, names[1]: 2, names[2]: 0, "mlp.out": 1}
    )
    assert report.ranks == {names[0]: 1, names[1]: 2, names[2]: 0, "mlp.out": 1}
    found = ORACLES[consumer](tmp_path / "a")
    saved = tensors(tmp_path / "a")
    assert [len(saved[f"base_model.model.{name}.lora_A.weight"]) for name in names] == [2, 2, 2]
    assert len(saved["base_model.model.mlp.out.lora_A.weight"]) == 1
    for name in (*names, "mlp.out"):
        u, sigma, v = torch.linalg.svd(delta(model.get_base_model().get_submodule(name)), full_matrices=False)
        rank = report.ranks[name]
        assert_close(found[name], (u[:, :rank] * sigma[:rank]) @ v[:rank], rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "head": (
        dict(cls=LlamaForSequenceClassification, task_type=TaskType.SEQ_CLS),
        dict.fromkeys(
            ORACLES, r"loads A and B only.*1 other tensors, 'base_model.model.score.weight'.*modules_to_save"
        ),
    ),
    "tokens": (
        dict(trainable_token_indices=[1]),
        dict.fromkeys(ORACLES, r"A and B only.*trainable_token_indices=\[1\].*merge_and_unload"),
    ),
    "resized": (dict(resized=True), dict.fromkeys(ORACLES, r"embed_tokens.weight.*the vocabulary was resized")),
    "repeated": (
        dict(layer_replication=[(0, 2), (1, 2)]),
        dict.fromkeys(ORACLES, 'knows no layer_replication.*for_="peft"'),
    ),
    "bias": (dict(bias="all", target_modules=["q_proj"]), {}),
    "tied": (
        dict(target_modules=["lm_head"], tied=True),
        {"llama.cpp": r"no matrix of its own for lm_head.*ranks=\{'lm_head': 0\}"},
    ),
    "output layer": (dict(target_modules=["lm_head"]), {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("consumer", ORACLES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_consumer_cannot_hold_is_refused(
    tmp_path: Path, base: Callable[..., Any], consumer: Any, name: str
) -> None:
    case, says = REFUSED[name]
    model = adapted(base, case)
    if consumer not in says:
        fwlora.export_adapter(model, tmp_path / "a", for_=consumer)
        assert ORACLES[consumer](tmp_path / "a")
        return
    with pytest.raises(ValueError, match=says[consumer]):
        fwlora.export_adapter(model, tmp_path / "a", for_=consumer)
    assert not (tmp_path / "a").exists()


def test_more_refusals(tmp_path: Path) -> None:
    """bias="all" writes the biases of the layers that have some; the converter transposes Conv1D; vLLM's ranks end."""
    for consumer in ORACLES:
        with pytest.raises(ValueError, match="A and B only.*bias='all'"):
            fwlora.export_adapter(lora_net(bias="all", modules_to_save=None), tmp_path / "a", for_=consumer)  # type: ignore[arg-type]
    conv1d = lora_net(kind="conv1d", modules_to_save=None)
    with pytest.raises(ValueError, match="would transpose the adapter of first, a Conv1D layer"):
        fwlora.export_adapter(conv1d, tmp_path / "a", for_="llama.cpp")
    wide = lora_net(r=520, modules_to_save=None)
    with pytest.raises(ValueError, match="vLLM loads ranks up to 512, and the highest is 520"):
        fwlora.export_adapter(wide, tmp_path / "a", for_="vllm")
    assert not (tmp_path / "a").exists()
    fwlora.export_adapter(conv1d, tmp_path / "a", for_="vllm")
    fwlora.export_adapter(wide, tmp_path / "a", for_="llama.cpp")


# ---- the change of the outputs -------------------------------------------------------------------------------------


def test_masked_tokens_do_not_count(tmp_path: Path, base: Callable[..., Any]) -> None:
    model = adapted(base, {})
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask}
    report = fwlora.export_adapter(model, tmp_path / "a", ranks=1, batches=[batch])
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "a")).eval()
    with torch.no_grad():
        p, q = (m(**batch).logits[mask.bool()].double() for m in (model, loaded))
    assert report.outputs is not None and report.outputs.kl is not None
    assert report.outputs.mean == pytest.approx(float((p - q).abs().mean()), rel=1e-4)
    kl = nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean")
    assert report.outputs.kl == pytest.approx(float(kl), rel=1e-3) and kl > 1e-6


def test_a_single_output_has_no_divergence() -> None:
    model = nn.Linear(3, 1)
    change = output_change(model, {"bias": model.bias.detach() + 2}, [torch.ones(4, 3)])
    assert change.mean == change.max == pytest.approx(2) and change.kl is None
