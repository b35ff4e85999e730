"""Models: made on the spot or loaded, and every technique applied to them from outside, in one place and one order.

The model code is transformers' own and stays as it is. A model made on the spot is written once as an ordinary HF
folder (`<run>/base_model`) and then loaded like any other, so there is one loading path: safetensors straight to the
rank's device, or to its ZeRO-3 shard.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from farspan.errors import JobError
from farspan.memory.config import Tiles
from farspan.memory.coupling import Coupling
from farspan.memory.density import Density, add_density
from farspan.memory.executor import Executor
from farspan.memory.frame import reads_last
from farspan.memory.operators import keep_less
from farspan.memory.plan import Placement
from farspan.trainer import attention
from farspan.trainer.adapters.config import Adapter, inner
from farspan.trainer.adapters.l4q.apply import add_learned_steps
from farspan.trainer.adapters.layers import decoder_layers
from farspan.trainer.adapters.lora.apply import install, keep_rows
from farspan.trainer.adapters.lora.start import STARTED, lora_layers, reserve
from farspan.trainer.adapters.paca.apply import add_columns
from farspan.trainer.adapters.peqa.apply import add_scales
from farspan.trainer.adapters.pv.apply import add_codes
from farspan.trainer.adapters.reversible.apply import couple
from farspan.trainer.adapters.s2a.apply import add_parts
from farspan.trainer.adapters.targets import no_such_target
from farspan.trainer.adapters.unipt.apply import add_side_network
from farspan.trainer.attention import PackedSequence
from farspan.trainer.bases.load import loading_options, prepared_options, take_over
from farspan.trainer.bases.prepared.store import PreparedBase, start_adapters
from farspan.trainer.config import (
    L4Q,
    PEQA,
    PREPARED_INITS,
    PV,
    S2A,
    Base,
    DensityLoss,
    FullFineTune,
    LoRA,
    Model,
    PaCA,
    Precision,
    RandomModel,
    Reversible,
    TrainSpec,
    UniPT,
    Unquantized,
)
from farspan.trainer.loss import IGNORED, LossHead, Objective
from farspan.trainer.run_folder import RunFolder
from farspan.trainer.tiling import tile_mlp

if TYPE_CHECKING:
    from farspan.memory.tiers import Store

UNQUANTIZED = Unquantized()
NO_DENSITY_LOSS = DensityLoss()
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def random_config(model: RandomModel, *, context: int, eos_id: int | None, pad_id: int | None) -> Any:
    """transformers configuration of a model made on the spot."""
    return AutoConfig.for_model(
        model.family,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.hidden // model.heads,
        intermediate_size=model.ffn,
        vocab_size=model.vocab,
        max_position_embeddings=context,
        tie_word_embeddings=model.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )


def write_random_model(
    model: RandomModel, folder: Path, *, precision: Precision, context: int, eos_id: int | None, pad_id: int | None
) -> None:
    """Initialise the weights (fp32, seeded, the family's own initialiser) and save them as an HF folder."""
    config = random_config(model, context=context, eos_id=eos_id, pad_id=pad_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.init_seed)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.generation_config = GenerationConfig(eos_token_id=eos_id, pad_token_id=pad_id)
    beside = folder.with_name(f".{folder.name}.tmp")
    with _quiet_transformers():
        made.to(DTYPES[precision]).save_pretrained(beside)
    beside.rename(folder)


def load_model(
    source: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    base: Base = UNQUANTIZED,
    prepared: PreparedBase | None = None,
) -> PreTrainedModel:
    """Load a causal language model with Farspan's attention; under ZeRO-3 (see `zero3`) each rank keeps its shard.

    Args:
        base: how its linear layers are stored; a checkpoint that is quantized stays as it is.
        prepared: what they were rounded to before.
    """
    placed: dict[str, Any] = {} if _zero3_active() else {"device_map": {"": device}}
    with _quiet_transformers():
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=dtype,
                attn_implementation=attention.NAME,
                **placed,
                **(loading_options(base, source, revision) if prepared is None else prepared_options(prepared)),
            )
            take_over(model)
            if device.type == "cuda" and not isinstance(base, Unquantized):
                torch.cuda.empty_cache()  # matrices in 16 bits went through it
            return model
        except ImportError as error:
            raise JobError(
                f"the model {source!r} cannot be loaded",
                at="model.id",
                why=str(error).strip().split("\n", maxsplit=1)[0],
                try_="pip install 'farspan[bnb]' for checkpoints that bitsandbytes has quantized",
            ) from error
        except (OSError, ValueError) as error:
            raise JobError(
                f"the model {source!r} cannot be loaded",
                at="model.id",
                why=str(error).split("\n", maxsplit=1)[0],
                try_="give a hub id this machine can reach, or a folder with config.json and safetensors",
            ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars in worker logs."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _zero3_active() -> bool:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextlib.contextmanager
def zero3(active: bool, device: torch.device) -> Iterator[None]:
    """Inside, `load_model` partitions every weight over the ranks as it is read, so none holds the whole model."""
    if not active:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    from farspan.trainer.engine_deepspeed import import_deepspeed

    import_deepspeed(device)
    # transformers looks the configuration up through a weak reference: it lives as long as this name
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        yield
    finally:
        del config
        unset_hf_deepspeed_config()


class CausalLMLoss(nn.Module):
    """What the loop calls: one pack's rows in, the sum of their token losses out."""

    executor: Executor | None = None
    """Carries out the memory plan; None where autograd keeps everything."""
    coupling: Coupling | None = None
    """Reversible streams around the layers."""
    density: Density | None = None
    """A penalty on the density of MLP activations."""

    def __init__(self, model: nn.Module, causal: PreTrainedModel, *, loss_tile: int) -> None:
        super().__init__()
        self.model = model
        self.head = LossHead(_projection(causal), tile=loss_tile, scale=_logit_scale(causal.config))
        self._causal = (causal,)  # in a tuple: registering it again would list every parameter twice

    @property
    def decoder(self) -> nn.Module:
        """Embedding, decoder layers and final norm, as transformers runs them."""
        decoder: nn.Module = self._causal[0].get_decoder()
        return decoder

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, bottom first."""
        return decoder_layers(self._causal[0])

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        sequence: PackedSequence,
        objective: Objective | None = None,
    ) -> Tensor:
        """Sum of token losses over this rank's rows, or another loss of them.

        Args:
            input_ids, labels, position_ids: int64 [1, s]; labels are shifted already, -100 where nothing is trained.
            sequence: boundaries of the whole pack and the exchange of the sp group.
            objective: a loss of log-probabilities instead.
        """
        hidden = self.decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **{attention.KEYWORD: sequence}
        ).last_hidden_state
        loss: Tensor = self.head(hidden.flatten(0, 1), labels.flatten(), objective)
        return loss if self.density is None else self.density.attach(loss, labels, IGNORED)


def hollow_layers(causal: PreTrainedModel) -> bool:
    """Whether rebuilds may leave out the last matmul: not where its output is read in backward, by a norm that follows
    the MLP (OLMo 2, Gemma) or by the layer itself (PEQA)."""
    names, layers = ("post_feedforward_layernorm", "post_mlp_layernorm"), decoder_layers(causal)
    return not any(hasattr(layer, name) for layer in layers for name in names) and not any(map(reads_last, layers))


def _projection(causal: PreTrainedModel) -> nn.Linear:
    head: Any = causal.get_output_embeddings()
    if type(head).__name__ == "ModulesToSaveWrapper":
        head = head.modules_to_save[head.active_adapter]
    if type(head) is not nn.Linear:
        raise JobError(
            f"the output projection is a {type(head).__name__}, which the tiled loss cannot use",
            at="adapter.target_modules",
            why="logits are never held whole, so the projection must be one weight matrix",
            try_="leave lm_head out of target_modules, or train it whole with adapter.modules_to_save=[lm_head]",
        )
    return head


def _logit_scale(config: Any) -> float:
    if getattr(config, "final_logit_softcapping", None):
        raise JobError(
            f"{config.model_type} caps its logits with a tanh, which the tiled loss does not compute",
            at="model",
            why=f"final_logit_softcapping = {config.final_logit_softcapping}",
            try_="use a model without final_logit_softcapping",
        )
    if getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies


def add_adapter(
    model: PreTrainedModel, adapter: Adapter, *, seed: int, streams: list[Coupling] | None = None
) -> nn.Module:
    """Freeze the base and add an adapter (weights in the base's dtype), or train everything.

    Every rank draws the same adapter: the generator is seeded, and restored afterwards.

    Args:
        streams: receives the coupling of reversible layers.
    """
    if isinstance(adapter, Reversible):
        adapted = add_adapter(model, inner(adapter), seed=seed)
        coupling = couple(model, adapter, seed=seed)
        if streams is not None:
            streams.append(coupling)
        return adapted
    if isinstance(adapter, FullFineTune):
        return model
    if isinstance(adapter, PEQA):
        add_scales(model, adapter)
        return model
    if isinstance(adapter, UniPT):
        add_side_network(model, adapter, seed=seed)
        return model
    if isinstance(adapter, S2A):
        add_parts(model, adapter, seed=seed)
        return model
    if isinstance(adapter, PV):
        add_codes(model, adapter)
        return model
    if isinstance(adapter, L4Q):
        add_learned_steps(model, adapter, seed=seed)
        return model
    if isinstance(adapter, PaCA):
        add_columns(model, adapter, seed=seed)
        return model
    return _add_lora(model, adapter, seed=seed)


def _add_lora(model: PreTrainedModel, adapter: LoRA, *, seed: int) -> nn.Module:
    """peft's model, its layers run our way."""
    from peft import LoraConfig, get_peft_model

    targets = adapter.target_modules if isinstance(adapter.target_modules, str) else list(adapter.target_modules)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha if adapter.alpha is not None else 2 * _divisor(adapter),
        lora_dropout=adapter.dropout,
        target_modules=targets,
        modules_to_save=list(adapter.modules_to_save) or None,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=True if adapter.init in ("default", *STARTED, *PREPARED_INITS) else adapter.init,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise no_such_target(model, str(error).split("\n", maxsplit=1)[0]) from error
    if adapter.init in STARTED:
        reserve(adapted)
    for layer in lora_layers(adapted).values() if adapter.dora else ():
        layer.get_base_layer().reads_output = True  # the lengths of rows are multiplied with it
    install(adapted)
    if adapter.keep_rows < 1:
        keep_rows(adapted, adapter.keep_rows)
    return adapted


def _divisor(adapter: LoRA) -> float:
    """What the scale of an adapter divides alpha by."""
    return math.sqrt(adapter.rank) if adapter.rslora else adapter.rank


def prepare_model(
    causal: PreTrainedModel,
    *,
    adapter: Adapter,
    memory: Tiles,
    seed: int,
    placement: Placement | None = None,
    store: Store | None = None,
    density: DensityLoss = NO_DENSITY_LOSS,
) -> tuple[CausalLMLoss, dict[str, nn.Parameter]]:
    """Apply everything a job asks for to a loaded model.

    The order: adapters first, since they replace linear layers; then a penalty on activations, which the operators
    that keep less take over; these operators that keep less, which call them;
    then the MLP tiles, which wrap the layers as they are by then; then the executor, which rebuilds whole layers, tiles
    included; the loss head last, since an adapter may have swapped the projection it shares.

    Args:
        placement: what each layer stores; None: autograd's own way.
        store: host and disk, for a placement that uses them.

    Returns:
        the module whose forward is the loss, and its trainable parameters by name.
    """
    streams: list[Coupling] = []
    model = add_adapter(causal, adapter, seed=seed, streams=streams)
    penalty = Density(density.weight, density.eps, density.threshold) if density.weight else None
    if penalty is not None:
        add_density(decoder_layers(causal), penalty)
    keep_less(
        decoder_layers(causal), memory.activations, hidden_act=getattr(causal.config, "hidden_act", None) or "silu"
    )
    if memory.mlp_tile != "off":
        tile_mlp(model, memory.mlp_tile)
    executor = None
    if placement is not None and not placement.keeps_everything:
        executor = Executor(
            decoder_layers(causal),
            placement,
            store,
            hollow=hollow_layers(causal),
            coupling=streams[0] if streams else None,
        )
    module = CausalLMLoss(model, causal, loss_tile=memory.loss_tile)
    module.executor, module.coupling = executor, streams[0] if streams else None
    module.density = penalty
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    module.train()
    return module, trainable


def open_store(spec: TrainSpec, device: torch.device) -> Store | None:
    """This rank's host and disk tiers, where the placement uses them."""
    from farspan.memory.tiers import Store

    if spec.tiers is None:
        return None
    return Store(
        host_bytes=spec.tiers.host_bytes,
        disk_dir=Path(spec.tiers.disk_dir) if spec.tiers.disk_dir is not None else None,
        disk_bytes=spec.tiers.disk_bytes,
        slots=spec.tiers.slots,
        device=device,
    )


def build(
    spec: TrainSpec, device: torch.device, store: Store | None = None
) -> tuple[CausalLMLoss, dict[str, nn.Parameter]]:
    """Load the job's model on this rank and prepare it; models made on the spot must have been written before."""
    source, revision = base_source(spec)
    with zero3(spec.zero == 3, device):
        dtype = DTYPES[spec.precision]
        prepared = PreparedBase.open(spec.prepared_base) if spec.prepared_base is not None else None
        causal = load_model(source, revision=revision, dtype=dtype, device=device, base=spec.base, prepared=prepared)
        module, trainable = prepare_model(
            causal,
            adapter=spec.adapter,
            memory=spec.memory,
            seed=spec.optim.seed,
            placement=spec.placement,
            store=store,
            density=spec.density,
        )
        if prepared is not None:
            start_adapters(module.model, prepared)
        return module, trainable


def base_source(spec: TrainSpec) -> tuple[str, str | None]:
    """Hub id or folder of the untrained base, and its revision."""
    if isinstance(spec.model, Model):
        return spec.model.id, spec.model.revision
    return str(RunFolder(Path(spec.run_dir)).base_model), None
