"""Architectures of transformers from tiny configs, and F of each against an unfrozen twin.

Used by tests/fwlora/test_architectures.py and by scripts/architectures.py, which prints the table.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import fwlora
from fwlora import FWLoraConfig, estimators

REAL = ("pixel_values", "input_features")
EXAMPLES, TOKENS, VOCABULARY, COLUMNS = 3, 7, 40, 6
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
NARROW = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART = {**NARROW, **HEADS, "decoder_start_token_id": 2, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}


def ids(**more: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, VOCABULARY, (EXAMPLES, TOKENS), generator=g), **more}


def both() -> dict[str, Any]:
    return ids(decoder_input_ids=ids()["input_ids"].flip(1)[:, :5])


def image() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(EXAMPLES, 3, 8, 8, generator=g, dtype=torch.float64)}


def speech() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(EXAMPLES, 8, 12, generator=g, dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": ids()["input_ids"][:, :4]}


def text_and_image() -> dict[str, Any]:
    return {**ids(), **image()}


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers, tiny.

    Args:
        name: what the table says.
        kind: encoder, decoder, encoder-decoder, mixture of experts, state space, image, speech.
        head: the Auto class, without "AutoModel", or a class of transformers.
        settings: of its config, beside `SIZES`; None takes away one of those.
        inputs: of its forward pass.
        model_type: transformers' name, where it is not `name`.
        targets: of LoRA.
        dtype: float32 where a layer of the model demands it.
    """

    name: str
    kind: str
    head: str = "ForCausalLM"
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Any]] = ids
    model_type: str | None = None
    targets: str | list[str] = "all-linear"
    dtype: torch.dtype = torch.float64

    def model(self) -> Any:
        """The model with LoRA, B not zero."""
        torch.manual_seed(0)
        settings = {name: value for name, value in {**SIZES, **self.settings}.items() if value is not None}
        config: Any = transformers.AutoConfig.for_model(self.model_type or self.name, **settings)
        config._experts_implementation = "eager"  # grouped products of matrices are for half and single precision
        model = getattr(transformers, f"AutoModel{self.head}").from_config(config)
        lora = LoraConfig(r=2, lora_alpha=3, target_modules=self.targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Conv1D: PEFT says that it sets fan_in_fan_out itself
            model = get_peft_model(model, lora).to(self.dtype)  # type: ignore[union-attr]
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
        return model

    def loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """A mean over the examples of a function of each one's outputs."""
        torch.manual_seed(1)  # the same dropout for every model
        outputs = model(**{n: v.to(self.dtype) if n in REAL else v for n, v in inputs.items()})
        total = torch.zeros((), dtype=torch.float64)
        for name in ("logits", "last_hidden_state", "pooler_output", "text_embeds", "image_embeds"):
            values = getattr(outputs, name, None)
            if values is not None:
                values = values.double().flatten(1)
                g = torch.Generator().manual_seed(2)
                direction = torch.randn(values.shape[1], generator=g, dtype=torch.float64)
                total = total + (values.sin() * direction).sum() / EXAMPLES
        return total


def _encoder(name: str, **more: Any) -> Architecture:
    return Architecture(name, "encoder", "ForSequenceClassification", **more)


def _decoder(name: str, settings: dict[str, Any] | None = None, **more: Any) -> Architecture:
    return Architecture(name, "decoder", settings=settings or {}, **more)


def _experts(name: str, settings: dict[str, Any] | None = None, **more: Any) -> Architecture:
    """Experts are three-dimensional parameters, and PEFT's wrapper of them is refused: the attention is adapted."""
    more = {"targets": ATTENTION, **more}
    return Architecture(name, "mixture of experts", settings={**EXPERTS, **(settings or {})}, **more)


def _state(name: str, settings: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(name, "state space", settings=settings, **more)


def _both(name: str, settings: dict[str, Any]) -> Architecture:
    return Architecture(name, "encoder-decoder", "ForSeq2SeqLM", settings, both)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Mamba reads the weights of dt_proj and, in its kernel, of out_proj without calling the layers: LoRA has no effect on
# the first, and PEFT refuses the second.
MAMBA = ["in_proj", "x_proj"]
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 24}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
MAMBA2 = {"state_size": 4, "num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 4}

ARCHITECTURES = [
    _encoder("bert"),
    _encoder("roberta"),
    _encoder("xlm-roberta"),
    _encoder("camembert"),
    _encoder("electra", settings={"embedding_size": 12}),
    _encoder("albert", settings={"embedding_size": 12, "num_hidden_groups": 1}),
    _encoder("distilbert", settings={"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}),
    _encoder("mpnet"),
    _encoder("deberta", settings={"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}),
    _encoder(
        "deberta-v2",
        settings={
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
            "type_vocab_size": 0,
        },
    ),
    _encoder("modernbert", settings={"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}),
    _encoder("funnel", settings={"num_hidden_layers": None, "block_sizes": [1, 1], "d_model": 16, "n_head": 2,
        "d_head": 8, "d_inner": 24}),
    _encoder("roformer"),
    _encoder("convbert", settings={"embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3}),
    _encoder("squeezebert", settings={"embedding_size": 16, "q_groups": 1, "k_groups": 1, "v_groups": 1,
        "post_attention_groups": 1, "intermediate_groups": 1, "output_groups": 1}, targets=["pooler.dense"]),
    _decoder("gpt2", GPT2),
    _decoder("gpt_neo", {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}),
    _decoder("gpt_neox"),
    _decoder("gptj", {**GPT2, "rotary_dim": 4}),
    _decoder("gpt_bigcode", GPT2),
    _decoder("codegen", {**GPT2, "n_head": 4, "num_attention_heads": None, "rotary_dim": 4}),
    _decoder("opt", {"ffn_dim": 24, "word_embed_proj_dim": 12}),
    _decoder("bloom", {"n_layer": 2, "n_head": 2}),
    _decoder("mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2}),
    _decoder("xglm", {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24}, dtype=torch.float32),
    Architecture("falcon (parallel)", "decoder", model_type="falcon", settings={"parallel_attn": True}),
    Architecture(
        "falcon (new decoder)",
        "decoder",
        model_type="falcon",
        settings={"new_decoder_architecture": True, "num_attention_heads": 4, "num_kv_heads": 2},
    ),
    _decoder("llama", GROUPED),
    _decoder("mistral", GROUPED),
    _decoder("qwen2", GROUPED),
    _decoder("qwen3", GROUPED),
    _decoder("gemma", GROUPED),
    _decoder("gemma2", {**GROUPED, "query_pre_attn_scalar": 8}),
    _decoder("gemma3_text", GROUPED),
    _decoder("phi"),
    _decoder("phi3", {"num_key_value_heads": 2}),
    _decoder("olmo", {"num_key_value_heads": 2}),
    Architecture("olmo (clip_qkv)", "decoder", model_type="olmo", settings={"clip_qkv": 0.01}),
    _decoder("olmo2"),
    _decoder("stablelm", {"num_key_value_heads": 2}),
    _decoder("cohere", {"num_key_value_heads": 2}),
    _decoder("nemotron", {"num_key_value_heads": 2, "head_dim": 8}),
    _decoder("granite", {"num_key_value_heads": 2}),
    _decoder("starcoder2", {"num_key_value_heads": 2}),
    _decoder("glm", GROUPED),
    _decoder("exaone4", GROUPED),
    _decoder("smollm3", GROUPED),
    _decoder("persimmon"),
    _decoder("biogpt"),
    _experts("mixtral"),
    _experts("qwen2_moe", {"shared_expert_intermediate_size": 12, "decoder_sparse_step": 1}),
    _experts("qwen3_moe", {"decoder_sparse_step": 1}),
    _experts("olmoe", {"num_attention_heads": 2, "num_key_value_heads": 2}),
    _experts("granitemoe"),
    _experts("phimoe"),
    _experts(
        "deepseek_v3",
        {
            "head_dim": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
        targets=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    ),
    _both("t5", T5),
    _both("mt5", {**T5, "feed_forward_proj": "gated-gelu"}),
    Architecture("switch_transformers", "mixture of experts", "ForSeq2SeqLM",
        {**T5, "num_experts": 3, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
         "num_sparse_decoder_layers": 1}, both,
        targets=["q", "k", "v", "o", "wi", "wo"], dtype=torch.float32),
    _both("bart", BART),
    _both("mbart", BART),
    _both("pegasus", BART),
    _both("marian", {**BART, "decoder_vocab_size": VOCABULARY}),
    _both("blenderbot", BART),
    _both("m2m_100", BART),
    _both("led", {**BART, "attention_window": 4, "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64}),
    _state("mamba", {"state_size": 4, "time_step_rank": 2, "expand": 2}, targets=MAMBA),
    _state("mamba2", MAMBA2, targets=["in_proj"]),
    _state("falcon_mamba", {"state_size": 4, "time_step_rank": 2, "expand": 2}, targets=MAMBA),
    _state("rwkv", {"attention_hidden_size": 16, "context_length": 16}, inputs=lambda: ids(use_cache=False)),
    _state("jamba", {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False},
        targets=[*ATTENTION, *MAMBA, "out_proj"]),
    _state("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4,
        "mamba_chunk_size": 4, "num_key_value_heads": 2}),
    _state("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8,
        "num_key_value_heads": 1, "head_dim": 8}),
    Architecture("vit", "image", "ForImageClassification", {"image_size": 8, "patch_size": 4}, image),
    Architecture("beit", "image", "ForImageClassification", {"image_size": 8, "patch_size": 4}, image),
    Architecture("dinov2", "image", "ForImageClassification", {"image_size": 8, "patch_size": 4}, image),
    Architecture("swin", "image", "ForImageClassification",
        {"num_attention_heads": None, "num_hidden_layers": None, "hidden_size": None,
         "image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        image),
    Architecture("clip", "image", "", {
        "text_config": {**SIZES}, "projection_dim": 8,
        "vision_config": {**SIZES, "image_size": 8, "patch_size": 4, "projection_dim": 8},
    }, text_and_image),
    Architecture("whisper", "speech", "ForSpeechSeq2Seq",
        {**BART, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16}, speech),
]  # fmt: skip


@dataclass
class Result:
    """The comparison of one architecture with its twin.

    Attributes:
        targets: adapted matrices that the twin has a gradient for.
        uses: calls of a matrix in one pass, the most.
        errors: by estimator, the largest |F − F of the twin| over matrices, divided by the larger of that matrix' F
            and 1e-6 of the largest F; None where no matrix has one value an example.
        loss: the relative difference between the attached model's loss and the twin's.
    """

    targets: int
    uses: int
    errors: dict[str, float | None]
    loss: float


def lora_layers(model: nn.Module) -> dict[str, Any]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def attached(model: Any, estimator: str) -> tuple[fwlora.FisherWeightedLoRA, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    settings: dict[str, Any] = {"fisher_ema_decay": 0.0, "penalty_strength": 0.0, "sketch_columns": COLUMNS}
    return fwlora.attach(model, optimizer, FWLoraConfig(warmup_steps=9, estimator=estimator, **settings)), optimizer


def _gradient(layer: Any) -> Tensor:
    weight = layer.base_layer.weight
    g = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return g.T if isinstance(layer.base_layer, transformers.pytorch_utils.Conv1D) else g


def _sketched(g: Tensor) -> float:
    probe = estimators.gaussian_probe(g.shape[1], COLUMNS, seed=0, step=0, device=g.device, dtype=g.dtype)
    return float((g @ probe).square().sum() / COLUMNS)


def _error(got: dict[str, float], want: dict[str, float]) -> float:
    floor = 1e-6 * max(want.values())
    return max(abs(got[n] - w) / max(w, floor) for n, w in want.items())


def compare(architecture: Architecture) -> Result:
    """One step of the architecture with each hooked estimator, and the same step of an unfrozen twin."""
    model, inputs = architecture.model(), architecture.inputs()
    twin = copy.deepcopy(model)
    for layer in lora_layers(twin).values():
        layer.base_layer.weight.requires_grad_(True)
    twin.train()
    loss = architecture.loss(twin, inputs)
    loss.backward()
    gradients = {n: _gradient(layer) for n, layer in lora_layers(twin).items()}
    model.train()
    errors: dict[str, float | None] = {}
    differences: list[float] = []
    for estimator, f_of in (("exact", lambda g: float(g.square().sum())), ("sketch", _sketched)):
        handle, optimizer = attached(model, estimator)
        own = architecture.loss(model, inputs)
        own.backward()
        optimizer.step()
        errors[estimator] = _error(handle.fisher(), {n: f_of(g) for n, g in gradients.items()})
        differences.append(float(abs(own - loss) / abs(loss)))
        handle.detach()
        optimizer.zero_grad()
    errors["per_example"], uses = _per_example(architecture, model, twin, inputs)
    used = sum(bool(g.any()) for g in gradients.values())
    return Result(used, max(uses.values(), default=0), errors, max(differences))


def _per_example(
    architecture: Architecture, model: Any, twin: Any, inputs: dict[str, Any]
) -> tuple[float | None, Counter[str]]:
    """Only for matrices that are used once a pass on one row an example; dropout off, so that examples are alike."""
    model.eval()
    twin.eval()
    uses: Counter[str] = Counter()
    rows: dict[str, int] = {}

    def see(name: str, args: Any) -> None:
        uses[name] += 1
        rows[name] = len(args[0]) if args[0].ndim > 1 else 0

    hooks = [m.register_forward_pre_hook(lambda _, a, n=n: see(n, a)) for n, m in lora_layers(model).items()]
    handle, optimizer = attached(model, "per_example")
    architecture.loss(model, inputs).backward()
    optimizer.step()
    handle.detach()
    for hook in hooks:
        hook.remove()
    # An expert's rows are tokens, and may be as many as there are examples by chance.
    want = {n: 0.0 for n, count in uses.items() if count == 1 and rows[n] == EXAMPLES and "expert" not in n}
    for i in range(EXAMPLES):
        twin.zero_grad()
        architecture.loss(twin, {n: v[i : i + 1] if isinstance(v, Tensor) else v for n, v in inputs.items()}).backward()
        for n, layer in lora_layers(twin).items():
            if n in want:
                want[n] += float(_gradient(layer).square().sum())
    return (_error(handle.fisher(), want) if want and max(want.values()) > 0 else None), uses
