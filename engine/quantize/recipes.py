"""What each method does to a model, as data: solvers, Hessians, damping and training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from anybit.engine.quantize.options import QuantizeOptions
from anybit.engine.quantize.solve.end_to_end import EndToEndOptions
from anybit.engine.quantize.solve.methods import Solver, solve_decoupleq, solve_joint
from anybit.engine.quantize.solve.relaxation import relaxed_pass
from anybit.engine.quantize.solve.training import TrainingOptions

LOW_WIDTHS = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class Recipe:
    """`solver` None means GPTQ on one uniform grid (`sliced`: for the widest width alone).

    `prefix_hessians`: a width's Hessians come from activations that the quantized blocks before produced at that
    width, else from the float model. `prefix_target`: a block learns to do to a width's own input what the float block
    does to it (decoupleQ), else to give what the float model has at this depth. `balance` is the power of a channel's
    size by which its weights are scaled. `end_to_end` maps widths to their training through the whole model.
    """

    solver: Solver | None
    sequences: int
    context: int
    damping: Mapping[int, float]
    sliced: bool = False
    prefix_hessians: bool = True
    prefix_target: bool = False
    true_sequential: bool = False
    balance: float = 0.0
    training: TrainingOptions | None = None
    training_sequences: int = 0
    importance: Mapping[int, float] = field(default_factory=lambda: dict.fromkeys((2, 3, 4, 6, 8), 1.0))
    end_to_end: Mapping[int, EndToEndOptions] = field(default_factory=dict)

    @property
    def needs_prefix(self) -> bool:
        """Whether the hidden states of each width must be followed through the model."""
        return self.prefix_hessians or self.training is not None


# The wider, the smaller the steps that still help: what is learnt at a larger rate does not carry over to other text.
_END_TO_END = {
    2: EndToEndOptions(48, 256, 2e-3),
    3: EndToEndOptions(40, 512, 1e-3),
    4: EndToEndOptions(3, 512, 5e-4),
}
HELD_OUT = 2
"""Sequences of the training ones that only decide whether a block's training is kept."""


def recipe_for(options: QuantizeOptions) -> Recipe:
    """The recipe of a calibrated method."""
    damping = dict.fromkeys((2, 3, 4, 6, 8), 0.01 if options.damping is None else options.damping)
    trained = options.stages > 1
    if options.method in ("gptq", "gptq-sliced"):
        return Recipe(
            None,
            options.sequences or 64,
            options.context or 1024,
            damping,
            sliced=options.method == "gptq-sliced",
            true_sequential=options.true_sequential,
        )
    if options.method in ("decoupleq", "decoupleq-projected"):
        projected = options.method == "decoupleq-projected"
        return Recipe(
            partial(solve_decoupleq, integer_step=relaxed_pass) if projected else solve_decoupleq,
            options.sequences or 64,
            options.context or 1024,
            damping,
            prefix_target=True,
            true_sequential=options.true_sequential,
            training=TrainingOptions(steps=64, learning_rate=2e-3) if trained else None,
            training_sequences=min(34, options.sequences or 64),
        )
    if options.damping is None:
        damping = dict.fromkeys(damping, 0.1)
    # Of equally many tokens, many short windows generalise better at 2 bits than few long ones.
    return Recipe(
        solve_joint,
        options.sequences or 96,
        options.context or 256,
        damping,
        prefix_hessians=options.true_sequential,
        true_sequential=options.true_sequential,
        balance=0.25,
        training=TrainingOptions(steps=8, tokens=256, learning_rate=4e-3) if trained else None,
        training_sequences=min(16, options.sequences or 64),
        end_to_end=_END_TO_END if trained else {},
    )
