"""The tables of a run: the one place where columns, their types, units and meanings are written.

Storage, the DataFrames and the documentation of the tables are all made from these declarations.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How a column is stored, and what a DataFrame shows for it."""

    COUNT = "int64"
    OPTIONAL_COUNT = "Int64"
    REAL = "float64"
    SINGLE = "float32"
    FLAG = "bool"
    TEXT = "string"
    PARAM = "name of a parameter"
    OPTIMIZER = "name of an optimizer"


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        name: as in the DataFrame; a unit stands at its end (``_ms``, ``_bytes``).
        kind: how it is stored and shown.
        meaning: what a value says, and when (before or after the step).
    """

    name: str
    kind: Kind
    meaning: str


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        name: the attribute of a scope that gives it.
        row: what one row stands for.
        columns: in the order of the DataFrame.
    """

    name: str
    row: str
    columns: tuple[Column, ...]


def _columns(*declared: tuple[str, Kind, str]) -> tuple[Column, ...]:
    return tuple(Column(*column) for column in declared)


# Single precision is for what is compared with a threshold or looked at; what is added up, compared
# with its neighbour or may leave the range of single precision is kept in double precision.
C, O, R, S, F, T, P, Z = (  # noqa: E741
    Kind.COUNT,
    Kind.OPTIONAL_COUNT,
    Kind.REAL,
    Kind.SINGLE,
    Kind.FLAG,
    Kind.TEXT,
    Kind.PARAM,
    Kind.OPTIMIZER,
)

RANK = Column(
    "rank",
    C,
    "the rank of the process, of those that trained together; the first column of every table of a "
    "run that several processes have written, and of no other",
)


def with_rank(table: Table) -> Table:
    """Return a table as it is where several processes have written it."""
    return Table(table.name, table.row, (RANK, *table.columns))


_STEP = ("step", C, "the step, counted from 0 over all watched optimizers")
_PARAM = (
    "param",
    P,
    "the parameter, as `model.named_parameters()` names it; `head#old.weight` for one whose place "
    "in the model another has taken",
)
_OPTIMIZER = ("optimizer", Z, "the optimizer, as the program names it")

PARAMS = Table(
    "params",
    "parameter",
    _columns(
        _PARAM,
        ("module", T, "path of the module that holds it; empty for the model itself"),
        ("module_type", T, "class of that module"),
        ("shape", T, "its shape, as in `(10, 64)`"),
        ("numel", C, "how many numbers it holds"),
        ("dtype", T, "their type, as in `float32`"),
        ("device", T, "where it lies"),
        ("requires_grad", F, "whether autograd computes a gradient for it, at the last look"),
        ("requires_grad_changed", O, "the step at which `requires_grad` was last seen to flip"),
        ("optimizer", T, "the optimizers that hold it, comma separated; empty if none does"),
        ("group", O, "its parameter group in the first of them"),
        ("aliases", T, "its other names, comma separated, when modules share it"),
        ("reached", F, "whether any backward has written its gradient in this run"),
        (
            "registered",
            F,
            "whether a watched model has it registered; False for one that only an optimizer "
            "holds, or that lies in a plain list or attribute of a module",
        ),
        ("norm_first", R, "L2 norm of its values when it was first met"),
        ("norm_last", R, "L2 norm of its values when the watch ended; equal if nothing moved it"),
        (
            "n_symmetric_looks",
            C,
            "at how many closer looks all rows of its values were equal, and all rows of its "
            "gradient too; of a recurrent layer's those of each gate",
        ),
        ("n_symmetric_columns_looks", C, "likewise of the columns of a matrix"),
        ("n_looks", C, "at how many closer looks both were read"),
        (
            "copy_of",
            T,
            "the parameter of another kind of module that began with the very same values: an "
            "output layer and an embedding",
        ),
        (
            "replicas",
            T,
            "the ranks that hold replicas of it, as `DistributedDataParallel` says, comma "
            "separated; empty where none says so",
        ),
        (
            "placements",
            T,
            "of a DTensor how it is spread over ranks, as in `Shard(dim=0) of 4`; then all numbers "
            "about it are of this rank's part. Empty for any other",
        ),
    ),
)

MODELS = Table(
    "models",
    "watched model",
    _columns(
        ("model", T, "the model, as the program names it"),
        ("kind", T, "its class"),
        (
            "ineffective_freezes",
            T,
            "attributes that look like a freeze and are none, such as `encoder.requires_grad`, "
            "comma separated",
        ),
        (
            "compiled",
            T,
            "paths of its parts that are compiled, whose inside is not seen, comma separated; its "
            "own name if that is all of it",
        ),
    ),
)

GROUPS = Table(
    "groups",
    "step and parameter group of the optimizer that stepped",
    _columns(
        _STEP,
        _OPTIMIZER,
        ("group", C, "position in `optimizer.param_groups`"),
        ("n_params", C, "how many parameters the group holds"),
        ("lr", R, "learning rate at this step"),
        ("weight_decay", R, "weight decay at this step"),
        ("beta1", R, "decay rate of the first moment (Adam family)"),
        ("beta2", R, "decay rate of the second moment (Adam family)"),
        ("eps", R, "term added to the denominator"),
        ("momentum", R, "momentum factor (SGD, RMSprop)"),
        ("options", T, "every other hyper-parameter of the group, as `name=value`"),
    ),
)

STEPS = Table(
    "steps",
    "attempt of an optimizer to update",
    _columns(
        _STEP,
        _OPTIMIZER,
        ("optimizer_step", C, "the same attempt, counted from 0 for this optimizer alone"),
        (
            "outcome",
            T,
            "`stepped`; `skipped` by the gradient scaler; `abandoned`: the step raised; "
            "`open`: backward ran, but the run ended before the step",
        ),
        (
            "loss",
            R,
            "sum of the roots of the backwards whose gradients this step is about: the scalar "
            "that it descends. Of a step that calls a closure several times, the last. NaN where "
            "a root is no scalar. Unscaled under a gradient scaler",
        ),
        ("n_forward", C, "outermost calls of watched models since this optimizer's last attempt"),
        (
            "n_backward",
            C,
            "backwards since then that wrote to its parameters, or to none at all, and were not "
            "cleared again before the next",
        ),
        ("order", T, "what happened since then, in order; repetitions as `×n`"),
        (
            "zeroed",
            T,
            "what the first of these backwards found in `.grad`: `none` (nothing there), `zero` "
            "(zeros), `partly` (some left as the last step used them), `never` (all left)",
        ),
        (
            "zeroed_by",
            T,
            "`optimizer.zero_grad` or `module.zero_grad` when called since the last attempt, "
            "`hand` when cleared otherwise, empty when not cleared",
        ),
        ("grad_norm", R, "L2 norm of all gradients that the step reads, taken right before it"),
        (
            "grad_norm_before_clipping",
            R,
            "the same as the first clipping since the last attempt found them; NaN without one",
        ),
        ("update_norm", R, "L2 norm of the change of all its weights; NaN if not recorded"),
        ("weight_norm", R, "L2 norm of all its weights before the step; NaN if not recorded"),
        ("n_fresh", C, "parameters whose gradient is `fresh`"),
        ("n_accumulated", C, "parameters whose gradient is `accumulated`"),
        ("n_compounded", C, "parameters whose gradient is `compounded`"),
        ("n_stale", C, "parameters whose gradient is `stale`"),
        ("n_assigned", C, "parameters whose gradient is `assigned`"),
        ("n_zeroed", C, "parameters whose gradient is `zeroed`"),
        ("n_none", C, "parameters whose gradient is `none`"),
        (
            "graph_nodes",
            C,
            "autograd nodes created between the first forward and the last backward",
        ),
        ("train_mode", F, "whether every watched model called since then was in training mode"),
        (
            "scaled",
            F,
            "whether the gradients that the step read were still multiplied by a scaler's scale "
            "(a fused optimizer divides by it inside its step); then `grad_norm` and the table "
            "`grads` are too, but `updates`, `moments` and `explain` are not",
        ),
        ("recorded", F, "whether this step was recorded in full"),
        ("backwards", T, "the backwards whose gradients it is about, as in `4, 5`"),
        (
            "discarded",
            T,
            "backwards since the last attempt whose gradients were cleared before any step used "
            "them",
        ),
        ("through_scaler", F, "whether it was called by a gradient scaler"),
        ("in_closure", F, "whether a closure computed its gradients inside the step"),
        (
            "written_between",
            R,
            "share of its parameters (of a few that are looked at) that were written in place "
            "since its step before, other than through `.data`; NaN where that is not known",
        ),
        ("forward_ms", R, "time in the outermost calls of watched models"),
        ("backward_ms", R, "time in backward"),
        ("step_ms", R, "time since this optimizer's last attempt, the whole loop body"),
        ("observe_ms", R, "of that, time spent by gradscope"),
    ),
)

STATUSES = ("none", "fresh", "accumulated", "compounded", "stale", "assigned", "zeroed")

GRADS = Table(
    "grads",
    "step and parameter of the optimizer that stepped",
    _columns(
        _STEP,
        _PARAM,
        _OPTIMIZER,
        (
            "status",
            T,
            "what the gradient is when the optimizer steps. `fresh`: written once since its last "
            "step, onto nothing. `accumulated`: written several times since. `compounded`: holds "
            "what an earlier step of this optimizer already used, plus more. `stale`: what an "
            "earlier step used, untouched since. `assigned`: put there by the program. `zeroed`: "
            "cleared to zero and not written since. `none`: no gradient",
        ),
        ("n_writes", C, "how often it was written since this optimizer's last step"),
        ("carried_from", O, "the earliest step whose used gradient is still in it"),
        ("edited", F, "changed in place by the program after the last backward wrote it"),
        ("edited_after_use", F, "changed in place by the program after the last step used it"),
        (
            "used_by_another",
            F,
            "whether a step of another optimizer has used it since it was last written or cleared",
        ),
        ("norm", R, "L2 norm of what the step reads: after clipping"),
        (
            "norm_before_clipping",
            R,
            "L2 norm as the first clipping since the last attempt found it; NaN if not clipped",
        ),
        ("mean", S, "mean of its elements; NaN if the step was not recorded"),
        ("std", S, "population standard deviation; NaN if the step was not recorded"),
        ("min", S, "least element; NaN if the step was not recorded"),
        ("max", S, "greatest element; NaN if the step was not recorded"),
        ("abs_max", S, "greatest magnitude; NaN if the step was not recorded"),
        ("zero_fraction", R, "share of exact zeros; NaN if the step was not recorded"),
        ("nonfinite", C, "how many elements are NaN or infinite"),
    ),
)

STATE = Table(
    "state",
    "recorded step, parameter, before or after, and key of the optimizer's state",
    _columns(
        _STEP,
        _PARAM,
        _OPTIMIZER,
        ("when", T, "`before` or `after` the update"),
        ("key", T, "as in `optimizer.state[p]`: `exp_avg`, `exp_avg_sq`, `momentum_buffer` …"),
        ("value", R, "the value itself, where the state is a single number such as `step`"),
        ("norm", R, "L2 norm"),
        ("mean", S, "mean of its elements"),
        ("abs_max", S, "greatest magnitude"),
        ("nonfinite", C, "how many elements are NaN or infinite"),
    ),
)

MOMENTS = Table(
    "moments",
    "recorded step and parameter of an optimizer of the Adam family",
    _columns(
        _STEP,
        _PARAM,
        _OPTIMIZER,
        ("step_count", C, "the optimizer's own count of steps of this parameter, after the update"),
        ("exp_avg_norm_before", R, "L2 norm of the first moment before the step; 0 if none yet"),
        ("exp_avg_norm_after", R, "L2 norm of the first moment after the step"),
        (
            "exp_avg_sq_norm_before",
            R,
            "L2 norm of the second moment before the step; 0 if none yet",
        ),
        ("exp_avg_sq_norm_after", R, "L2 norm of the second moment after the step"),
        (
            "max_exp_avg_sq_norm_before",
            R,
            "L2 norm of the greatest second moment so far, before the step; NaN without amsgrad",
        ),
        ("max_exp_avg_sq_norm_after", R, "the same after the step"),
        ("bias_correction1", R, "1 − β₁ᵗ, with t the step count after the update"),
        ("bias_correction2", R, "1 − β₂ᵗ"),
        (
            "denominator_min",
            S,
            "least element of what the (averaged) gradient is divided by, √(v / bias_correction2) "
            "+ ε in Adam",
        ),
        ("denominator_mean", S, "mean of its elements"),
        ("denominator_max", S, "its greatest element"),
        (
            "effective_lr_min",
            S,
            "least element of what the averaged gradient is multiplied by, lr / bias_correction1 "
            "/ denominator in Adam",
        ),
        ("effective_lr_mean", S, "mean of its elements"),
        ("effective_lr_max", S, "its greatest element"),
        (
            "momentum_gradient_cosine",
            S,
            "cosine between the first moment before the step and the gradient; near -1 where "
            "the optimizer is about to turn round; NaN before the second step",
        ),
    ),
)

UPDATES = Table(
    "updates",
    "recorded step and parameter of the optimizer that stepped; in a model of more than about four "
    "million parameters these take turns, and out of turn only the norms of weight and update and "
    "their ratio are there",
    _columns(
        _STEP,
        _PARAM,
        _OPTIMIZER,
        ("weight_norm_before", R, "L2 norm of the weight before the step"),
        ("weight_norm_after", R, "L2 norm of the weight after the step"),
        ("update_norm", R, "L2 norm of the change, from a kept copy of the weight before"),
        ("update_ratio", S, "update_norm / weight_norm_before; NaN for a weight of zeros"),
        (
            "decay_norm",
            R,
            "L2 norm of the part of the update that is due to weight decay; like all that follows "
            "NaN where gradscope has no formula of the optimizer",
        ),
        (
            "momentum_norm",
            R,
            "L2 norm of the part due to the optimizer's state before the step (old momentum); NaN "
            "where the update is not linear in it",
        ),
        ("fresh_norm", R, "L2 norm of the part due to this step's gradient; NaN likewise"),
        (
            "update_gradient_cosine",
            S,
            "cosine between the update and the negative gradient; known without a formula too",
        ),
        (
            "unchanged_fraction",
            R,
            "share of the elements that rounding left as they were: by the formula they were to "
            "move (without a formula: those that have a gradient)",
        ),
        (
            "eps_fraction",
            R,
            "share of the elements at which eps is the larger part of the denominator",
        ),
        (
            "residual",
            S,
            "L2 norm of the difference between the update and the formula's, relative to the "
            "larger of the two; 0 where both are 0",
        ),
        (
            "rounding",
            S,
            "what storing the weight in its dtype alone may add to the residual: its unit "
            "roundoff times weight_norm_after, relative to the same",
        ),
    ),
)

CHECKSUMS = Table(
    "checksums",
    "parameter, and step at whose beginning ranks are compared: an optimizer's first and those "
    "after 1, 2, 4, 8 … of its attempts; only where several processes train together",
    _columns(
        _STEP,
        _PARAM,
        _OPTIMIZER,
        (
            "attempt",
            C,
            "the attempt of this optimizer, counted from 0 since the watch began: what ranks have "
            "in common",
        ),
        (
            "weight",
            O,
            "a number made of the weight before the step, the same on two ranks if the weight is, "
            "to the last bit; missing where this rank holds but a part of it",
        ),
        (
            "gradient",
            O,
            "likewise of the gradient that the step reads; 0 for zeros, missing for none",
        ),
    ),
)

BACKWARDS = Table(
    "backwards",
    "call of backward or autograd.grad",
    _columns(
        ("backward", C, "counted from 0"),
        ("step", O, "the attempt that its gradients belong to; missing if none followed"),
        ("function", T, "`backward`, or `grad` for `torch.autograd.grad`, which writes no `.grad`"),
        ("root", R, "the loss it starts from, if a scalar"),
        ("root_shape", T, "shape of the root"),
        ("root_grad_fn", T, "the operation that made the root; empty for one without a graph"),
        ("root_requires_grad", F, "whether the root requires grad"),
        ("n_reached", C, "watched parameters whose gradient it wrote"),
        (
            "n_in_graph",
            O,
            "watched parameters among the leaves of its graph; missing where the graph was not "
            "walked, which it is at the first step and when a backward reaches nothing",
        ),
        ("ends_in_cut", F, "whether its graph was seen to end in a tensor cut from another graph"),
        (
            "repeats",
            O,
            "the earlier backward that started from the very same tensor; missing if none did",
        ),
        ("scaled", F, "whether its root came out of a gradient scaler's `scale`"),
        ("n_nodes", O, "operations in its graph; missing where it was not walked"),
        (
            "n_old_nodes",
            O,
            "of them, those made before the last attempt but one of any optimizer began; missing "
            "likewise",
        ),
        ("n_alive", C, "earlier backwards whose graph is still held by something"),
        ("retain_graph", F, "as passed"),
        ("create_graph", F, "as passed"),
        ("error", T, "class of the exception it raised, if any"),
        ("file", T, "the line of the program that called it"),
        ("line", O, "the line of the program that called it"),
    ),
)

STEP_PRE_HOOKS = "step pre-hooks of its own"
"""In what ``unobserved`` says of an optimizer whose gradients may be other than those read."""

EVENTS = Table(
    "events",
    "event outside forward, backward and step",
    _columns(
        ("time", R, "seconds since the watch began"),
        ("step", C, "the step that the next attempt will have"),
        (
            "event",
            T,
            "`watch_started`, `watch_stopped`, `paused`, `resumed`, `zero_grad`, `clip`, "
            "`unscale`, `scale_update`, `scheduler`, `mode`, `armed`, `cut`, `exception`, "
            "`optimizer_found`, `model_found`, `parameters_changed`, `instrument_failed`, "
            "`unobserved`, `nonfinite`, `non_leaf`, `ended`, `seam`, `out_of_sync`, `phase`, "
            "`cut_in_loss`",
        ),
        ("detail", T, "what exactly"),
        ("subject", T, "the optimizer concerned, as the program names it; empty if none is"),
        ("file", T, "the line of the program, where one is behind it"),
        ("line", O, "the line of the program, where one is behind it"),
    ),
)

CALLS = Table(
    "calls",
    "closer look and module that was called in it",
    _columns(
        ("step", C, "the step that the next attempt had at that time"),
        ("module", T, "its path, with the model's name in front where there are several"),
        ("module_type", T, "its class"),
        ("runs", C, "how often it was called"),
        ("training", F, "whether it was in training mode, at all of them"),
        ("with_grad", F, "whether gradients were enabled, at any of them"),
        ("checkpointed", F, "whether a reentrant checkpoint ran it without gradients"),
        ("has_graph", F, "whether any output had a `grad_fn`"),
        ("batch_size", O, "first dimension of its first tensor; missing without one"),
        ("values_per_channel", O, "of its first tensor: elements in each channel"),
        (
            "settings",
            T,
            "what its class adds: `momentum=0.1, track_running_stats=True`, and of a batch "
            "normalisation in evaluation mode `running_statistics=learnt`, unless they are those "
            "of a new one",
        ),
        ("file", T, "the line of the program that made it, where `gradscope run` saw that"),
        ("line", O, "the line of the program that made it"),
    ),
)

ACTIVATIONS = Table(
    "activations",
    "closer look and module without children that gave a tensor",
    _columns(
        ("step", C, "the step that the next attempt had at that time"),
        ("module", T, "its path"),
        ("module_type", T, "its class"),
        ("shape", T, "shape of the output"),
        ("mean", S, "mean of its elements"),
        ("std", S, "population standard deviation"),
        ("abs_max", S, "greatest magnitude"),
        ("zero_fraction", R, "share of exact zeros"),
        (
            "dead_fraction",
            S,
            "share of units (channels; of a matrix its columns) that are zero for the whole batch",
        ),
        (
            "saturated_fraction",
            S,
            "share of elements within 0.001 of the ends of a sigmoid or tanh; NaN for others",
        ),
        ("nonfinite", C, "how many elements are NaN or infinite"),
    ),
)

BATCHES = Table(
    "batches",
    "closer look and tensor given to a model or a loss function",
    _columns(
        ("step", C, "the step that the next attempt had at that time"),
        ("role", T, "`input` of a model, or `target` of a loss function"),
        ("owner", T, "the model, or the loss function"),
        ("shape", T, "its shape"),
        ("dtype", T, "its element type"),
        ("min", R, "least element"),
        ("max", R, "greatest element"),
        ("mean", R, "mean"),
        ("std", R, "population standard deviation"),
        (
            "scale_ratio",
            R,
            "of a matrix of floats: largest over smallest standard deviation of a column that is "
            "no constant; NaN for others",
        ),
        ("distinct", O, "how many different values it has; missing for floats of more than 2"),
        ("nonfinite", C, "how many elements are NaN or infinite"),
    ),
)

LOSSES = Table(
    "losses",
    "closer look and call of a loss function, or of an operation that broadcasts like one",
    _columns(
        ("step", C, "the step that the next attempt had at that time"),
        (
            "function",
            T,
            "as in `torch.nn.functional`: `cross_entropy`, `mse_loss` …; an operation: `sub` …; "
            "`written_cross_entropy` or `written_binary_cross_entropy` where a backward started "
            "from a mean of log-probabilities of labels",
        ),
        ("input_shape", T, "shape of the prediction"),
        ("target_shape", T, "shape of the target"),
        ("reduction", T, "`mean`, `sum` or `none`"),
        ("value", R, "the loss, if a scalar; of a written one negative where its sign is flipped"),
        ("n_classes", O, "classes of a classification; missing for others"),
        ("class_dim", O, "the dimension of the classes"),
        ("input_min", R, "least element of the prediction"),
        ("input_max", R, "greatest element of the prediction"),
        ("input_row_sum", R, "mean over the batch of the sum over classes of the prediction"),
        (
            "input_scale",
            R,
            "the number that the program has multiplied the prediction by, views and softmaxes "
            "passed over; one over a temperature",
        ),
        (
            "input_made_by",
            T,
            "the operation that gave the prediction, views and copies passed over: `Softmax`, "
            "`LogSoftmax`, `Sigmoid`, `Addmm` …; of an `nll_loss` or `kl_div` the logarithm behind "
            "weights that need no gradient",
        ),
        (
            "input_dim",
            O,
            "the dimension of the prediction over which a softmax or log-softmax that gave it ran; "
            "missing where a view has made it a part of another",
        ),
        ("reached", F, "whether a backward of the same look came past it"),
        (
            "left_out",
            T,
            "parameters that only losses of that look that no backward came past lead to, comma "
            "separated",
        ),
        ("file", T, "the line of the program that called it"),
        ("line", O, "the line of the program that called it"),
        (
            "owner",
            T,
            "class of the module that called it, as in `CrossEntropyLoss`; empty for none",
        ),
        ("owner_file", T, "the line that made that module, where `gradscope run` saw it"),
        ("owner_line", O, "the line that made that module"),
        (
            "made_at_file",
            T,
            "the line of `input_made_by`: where its module was made, if that was seen, or else "
            "where it was called; of a softmax, log-softmax or sigmoid only",
        ),
        ("made_at_line", O, "the line of `input_made_by`"),
    ),
)

STRANGERS = Table(
    "strangers",
    "closer look and leaf of its graph that is no parameter of a watched model or optimizer",
    _columns(
        ("step", C, "the step that the next attempt had at that time"),
        ("shape", T, "its shape"),
        ("is_parameter", F, "whether it is an `nn.Parameter`"),
        ("recurs", F, "whether the look before saw the very same tensor"),
        ("module", T, "the module whose call took it first; empty if none did"),
        ("file", T, "the line of the program that used it first, where it was seen"),
        ("line", O, "the line of the program that used it first"),
    ),
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        MODELS,
        PARAMS,
        GROUPS,
        STEPS,
        GRADS,
        STATE,
        MOMENTS,
        UPDATES,
        CHECKSUMS,
        BACKWARDS,
        CALLS,
        ACTIVATIONS,
        BATCHES,
        LOSSES,
        STRANGERS,
        EVENTS,
    )
}
