"""The rules of `model.attention_pattern`: which blocks there may be, and what a pattern excludes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalm.config.checks import not_divisible, rule

if TYPE_CHECKING:
    from megalm.config.run import RunConfig


@rule("model.attention_pattern", "model.sequence", "model.block_size")
def _blocks_divide_the_sequence(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.block_pattern is not None and model.sequence % model.block_size:
        yield not_divisible("model.sequence", model.sequence, "model.block_size", model.block_size)


@rule(
    "model.attention_pattern",
    "model.sequence",
    "model.block_size",
    "model.local_blocks",
    "model.block_stride",
    "model.global_tokens",
)
def _a_pattern_hides_something(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.attention_pattern == "full":
        return
    near = model.local_blocks * model.block_size
    if near >= model.sequence:
        yield (
            f"model.local_blocks={model.local_blocks} of model.block_size={model.block_size} tokens are all of "
            f"model.sequence={model.sequence}, so nothing is hidden; use fewer, or model.attention_pattern=full"
        )
        return
    pattern = model.block_pattern
    if pattern is None or pattern.summaries or model.sequence % pattern.block or model.block_stride == 1:
        return
    if not pattern.hides_any(model.sequence):
        yield (
            f"model.local_blocks={model.local_blocks}, model.global_tokens={model.global_tokens} and "
            f"model.block_stride={model.block_stride} leave no token of model.sequence={model.sequence} hidden; "
            "use less of one, or model.attention_pattern=full"
        )


@rule("model.attention_pattern", "model.sequence", "model.block_size", "model.block_stride")
def _strides_leave_blocks_out(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.attention_pattern != "strided" or model.block_stride is None:
        return
    blocks = model.sequence // model.block_size
    if model.block_stride == 1:
        yield "model.block_stride=1 takes every block, so nothing is hidden; use 2 or more, or none"
    elif model.block_stride >= blocks:
        yield (
            f"model.block_stride={model.block_stride} reaches beyond the {blocks} blocks of model.sequence="
            f"{model.sequence}, so it has no effect; use less than {blocks}, or none"
        )


@rule("model.attention_pattern", "model.block_size")
def _summaries_are_of_several_tokens(config: RunConfig) -> Iterator[str]:
    if config.model.attention_pattern == "hierarchical" and config.model.block_size == 1:
        yield (
            "model.block_size=1 makes each token its own summary, so nothing is hidden; use 2 or more, or "
            "model.attention_pattern=full"
        )


@rule("model.attention_pattern", "model.position")
def _summaries_have_no_place_in_a_table(config: RunConfig) -> Iterator[str]:
    if config.model.attention_pattern == "hierarchical" and config.model.position == "t5":
        yield (
            "model.position=t5 learns a bias for each distance of two tokens, and a summary of "
            "model.attention_pattern=hierarchical is at many; use another position, such as rotary or alibi, or "
            "model.attention_pattern=strided"
        )


@rule("model.attention_pattern", "model.document_mask")
def _summaries_are_of_one_document(config: RunConfig) -> Iterator[str]:
    if config.model.attention_pattern == "hierarchical" and config.model.document_mask:
        yield (
            "model.document_mask=true hides other documents, which a summary of model.attention_pattern=hierarchical "
            "may mix with a query's own; use model.document_mask=false, or model.attention_pattern=strided"
        )


@rule("model.attention_pattern", "model.window")
def _one_key_says_what_is_near(config: RunConfig) -> Iterator[str]:
    pattern, window = config.model.attention_pattern, config.model.window
    if pattern != "full" and window is not None:
        yield (
            f"model.window={window} and model.attention_pattern={pattern} both say which tokens are near; "
            "use model.window=null, or model.attention_pattern=full"
        )


@rule("model.attention_pattern", "train.compile", "model.dropout", "model.attention_dropout")
def _patterns_are_compiled_without_masks(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.attention_pattern != "full" and config.train.compile and model.probability_dropout > 0.0:
        yield (
            f"train.compile=true does not work with model.attention_pattern={model.attention_pattern} and dropped "
            "probabilities: their masks are drawn by a number, which a compiled program would keep; use "
            "model.attention_dropout=0.0, or train.compile=false"
        )


@rule("model.attention_pattern", "model.flash_attention")
def _patterns_store_no_whole_matrix(config: RunConfig) -> Iterator[str]:
    pattern = config.model.attention_pattern
    if pattern != "full" and not config.model.flash_attention:
        yield (
            f"model.flash_attention=false stores the whole matrix of scores, which model.attention_pattern={pattern} "
            "is there to spare; use model.flash_attention=true"
        )
