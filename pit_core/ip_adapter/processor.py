"""Decoupled attention inside a diffusers UNet.

`install_ip_adapter(unet)` puts a processor on every text cross-attention layer and returns the context that
they share; tokens go into the context. `uninstall_ip_adapter(unet)` gives the model back as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import PitError
from .adapter import IPAdapter, IPLayers
from .attention import TokenSource, Weight, plain_attention
from .layers import AttentionLayer, layers_of_unet


class IPContext:
    """What a UNet's processors read while it runs: the token sources and how the batch is ordered.

    order: the halves of the batch in their order, equal in size. None (the default) means ("uncond", "cond")
    when some source has unconditional tokens, as diffusers orders its batches, else ("cond",). Set it for
    two-pass guidance, or when both halves get the same tokens.
    train: K and V are computed at every forward, with gradients, instead of once per source.
    """

    def __init__(self, layers: Sequence[AttentionLayer]) -> None:
        self.layers = list(layers)
        self.adapter: IPAdapter | IPLayers | None = None
        self.sources: list[TokenSource] = []
        self.order: tuple[str, ...] | None = None
        self.train = False
        self.latent: tuple[int, int] | None = None
        self._hook: RemovableHandle | None = None

    def add(
        self,
        tokens: Tensor,
        uncond: Tensor | None = None,
        *,
        weight: Weight = 1.0,
        mask: Tensor | None = None,
        adapter: IPAdapter | IPLayers | None = None,
    ) -> TokenSource:
        """Add tokens (see TokenSource) to the coming runs; the terms of several sources add up.

        `adapter` is the one that the tokens belong to, if not the one in use. Raises PitError when it does
        not fit the UNet, or the tokens do not fit it.
        """
        layers = self._fitting(adapter if adapter is not None else self.adapter)
        source = TokenSource(layers, tokens, uncond, weight=weight, mask=mask, cache=not self.train)
        self.sources.append(source)
        return source

    def set_tokens(self, tokens: Tensor, uncond: Tensor | None = None, **options: Any) -> TokenSource:
        """`clear` and `add` in one: for the next picture, or each training step."""
        self.clear()
        return self.add(tokens, uncond, **options)

    def use(self, adapter: IPAdapter | IPLayers) -> None:
        """Make this the adapter that tokens belong to by default. Raises PitError when it does not fit."""
        self._fitting(adapter)
        self.adapter = adapter

    def _fitting(self, adapter: IPAdapter | IPLayers | None) -> IPLayers:
        if adapter is None:
            raise PitError("No IP-Adapter is in use; name the one that the tokens belong to.")
        if isinstance(adapter, IPLayers):
            adapter.check_fits(self.layers)
            return adapter
        adapter.layers.check_fits(self.layers, adapter.name)
        return adapter.layers

    def remove(self, source: TokenSource) -> None:
        self.sources.remove(source)

    def clear(self) -> None:
        """Drop all tokens and their K and V; the UNet runs as without an adapter."""
        self.sources.clear()

    def batch_order(self) -> tuple[str, ...]:
        if self.order is not None:
            return self.order
        return ("uncond", "cond") if any(s.uncond is not None for s in self.sources) else ("cond",)

    def active(self, n: int) -> list[TokenSource]:
        """The sources that weigh anything in layer n."""
        return [source for source in self.sources if source.layer_weight(n) != 0]

    def _see_latents(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self.latent = (sample.shape[-2], sample.shape[-1])


class IPAttnProcessor:
    """diffusers attention processor for one attn2 layer; without active tokens the former one runs."""

    def __init__(self, base: Any, context: IPContext, n: int) -> None:
        self.base = base
        self.context = context
        self.n = n

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        sources = self.context.active(self.n)
        if not sources or encoder_hidden_states is None:
            return self.base(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
        q = attn.to_q(hidden_states)
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        z = plain_attention(q, k, v, attn.heads, _text_mask(attn, attention_mask, k))
        order, latent = self.context.batch_order(), self.context.latent
        for source in sources:
            z = z + source.term(q, self.n, attn.heads, order, latent)
        z = attn.to_out[1](attn.to_out[0](z))
        z = z + hidden_states if attn.residual_connection else z
        return z / attn.rescale_output_factor


def install_ip_adapter(unet: nn.Module, adapter: IPAdapter | IPLayers | None = None) -> IPContext:
    """Ready a diffusers UNet for image tokens, `adapter` being the one that tokens belong to by default.

    A UNet that is ready already keeps its context. Raises PitError for a UNet without the plain
    cross-attention of SD1.5 and SDXL, and for an adapter that does not fit it.
    """
    context = installed_context(unet) or _install(unet)
    if adapter is not None:
        context.use(adapter)
    return context


def _install(unet: nn.Module) -> IPContext:
    layers = layers_of_unet(unet)
    attentions = [unet.get_submodule(layer.module) for layer in layers]
    _check_plain(attentions)
    context = IPContext(layers)
    for layer, attn in zip(layers, attentions, strict=True):
        # One by one: `unet.set_attn_processor(dict)` empties the dict that it is given.
        attn.set_processor(IPAttnProcessor(attn.processor, context, layer.index))  # type: ignore[operator]
    context._hook = unet.register_forward_pre_hook(context._see_latents, with_kwargs=True)
    return context


def uninstall_ip_adapter(unet: nn.Module) -> None:
    """Put the former processors back; the UNet is then what it was, bit for bit."""
    context = installed_context(unet)
    if context is None:
        return
    for _name, attn in _ip_attentions(unet):
        attn.set_processor(attn.processor.base)
    if context._hook is not None:
        context._hook.remove()
    context.clear()


def installed_context(unet: nn.Module) -> IPContext | None:
    """The context that `install_ip_adapter` made for this UNet, or None."""
    return next((attn.processor.context for _name, attn in _ip_attentions(unet)), None)


def _ip_attentions(unet: nn.Module) -> Iterable[tuple[str, Any]]:
    for name, module in unet.named_modules():
        if isinstance(getattr(module, "processor", None), IPAttnProcessor):
            yield name, module


def _text_mask(attn: Any, mask: Tensor | None, k: Tensor) -> Tensor | None:
    """diffusers' text mask (B, 1, N_k) as (B, heads, 1, N_k)."""
    if mask is None:
        return None
    prepared = attn.prepare_attention_mask(mask, k.shape[1], k.shape[0])
    return prepared.view(k.shape[0], attn.heads, -1, prepared.shape[-1])


def _check_plain(attentions: Iterable[Any]) -> None:
    """Refuse layers whose former processor does more than text attention, which ours would leave out."""
    for attn in attentions:
        extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
        found = [name for name in extras if getattr(attn, name, None)]
        if found:
            raise PitError(
                f"This UNet's cross-attention uses {found[0]}; IP-Adapters fit SD1.5 and SDXL UNets."
            )
