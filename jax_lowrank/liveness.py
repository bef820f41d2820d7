"""The most memory that a traced function holds at once, counted in its jaxpr.

What compilers do is followed in four things: the same operation on the same values is done once and
kept for its last reader (such as what a layer computes again and its derivative needs too),
elementwise results that are only read by other elementwise operations or sums are not stored, but
for dear ones with several readers, elementwise results may take the place of an operand that dies,
and loops run in place. Everything else is stored when it is made and freed after its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Another name for the same values.
ALIASES = frozenset(
    (
        "reshape",
        "squeeze",
        "expand_dims",
        "transpose",
        "name",
        "copy",
        "copy_p",
        "sharding_constraint",
        "stop_gradient",
        "optimization_barrier",
    )
)
# Made again for every reader sooner than stored: what they are made from is kept instead.
CHEAP = frozenset(
    (
        *("broadcast_in_dim", "convert_element_type", "iota", "slice", "rev", "pad", "clamp"),
        *("add", "add_any", "sub", "mul", "div", "square", "neg", "sign", "abs", "max", "min"),
        *("select_n", "not", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge"),
        *("floor", "round", "is_finite", "shift_left", "shift_right_logical"),
    )
)
ELEMENTWISE = CHEAP | frozenset(
    (
        *("rem", "pow", "integer_pow", "exp", "exp2", "expm1", "log", "log1p", "tanh"),
        *("logistic", "sin", "cos", "erf", "erf_inv", "sqrt", "rsqrt", "cbrt"),
        *("random_bits", "random_wrap", "random_unwrap", "random_fold_in", "threefry2x32"),
    )
)
CALLS = frozenset(
    (
        "jit",
        "closed_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
    )
)
IN_PLACE = ELEMENTWISE | {"dynamic_update_slice", "scatter", "scatter-add", "while", "scan"}


class Op(NamedTuple):
    """One operation; variables are numbers."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]


class Program(NamedTuple):
    """Operations without calls and aliases, and the bytes of every variable."""

    ops: list[Op]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sizes: list[int]


def peak(jaxpr, size: Callable[[Any], int], given: Sequence[int] = ()) -> int:
    """The most bytes held at once beside the inputs of a (closed) jaxpr.

    size(aval) -> bytes. given: places of the inputs that may be overwritten: donated, or carried
    by a loop.
    """
    program = flatten(jaxpr, size)
    ops, sizes = _needed(program), program.sizes
    stored, reads = _stored(ops, program)
    last = {v: step for step, read in enumerate(reads) for v in read}
    last.update(dict.fromkeys(program.outputs, len(ops)))
    owned = {program.inputs[place] for place in given}
    held = most = 0
    for step, op in enumerate(ops):
        new = [v for v in op.outputs if v in stored]
        dying = [v for v in reads[step] if last[v] == step and v in owned]
        replaced = 0
        if op.name in IN_PLACE:
            free = [sizes[v] for v in dying]
            for v in new:
                if sizes[v] in free:
                    free.remove(sizes[v])
                    replaced += sizes[v]
        made = sum(sizes[v] for v in new)
        most = max(most, held + made - replaced + _inside(op, size))
        held += made - sum(sizes[v] for v in dying)
        owned.update(new)
    return most


def flatten(jaxpr, size: Callable[[Any], int]) -> Program:
    """A jaxpr with its calls put in, every alias replaced by what it stands for, and what is done
    twice done once."""
    ops, sizes, known = [], [], {}

    def fresh(aval) -> int:
        sizes.append(size(aval))
        return len(sizes) - 1

    def walk(jaxpr, inputs: Sequence[int]) -> list[int]:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        names = dict(zip(jaxpr.invars, inputs))
        names.update((var, fresh(var.aval)) for var in jaxpr.constvars)

        def number(atom) -> int:
            if not hasattr(atom, "val"):
                return names[atom]
            key = (str(atom.val), str(atom.aval))
            if key not in known:
                known[key] = fresh(atom.aval)
            return known[key]

        for eqn in jaxpr.eqns:
            name, given = eqn.primitive.name, [number(atom) for atom in eqn.invars]
            inner = _called(eqn.params) if name in CALLS else None
            if inner is not None:
                names.update(zip(eqn.outvars, walk(inner, given)))
            elif name in ALIASES:
                names.update(zip(eqn.outvars, given))
            else:
                key = (name, tuple(given), str(eqn.params))
                if key not in known:
                    known[key] = tuple(fresh(var.aval) for var in eqn.outvars)
                    ops.append(Op(name, tuple(given), known[key], eqn.params))
                names.update(zip(eqn.outvars, known[key]))
        return [number(atom) for atom in jaxpr.outvars]

    inputs = tuple(fresh(var.aval) for var in getattr(jaxpr, "jaxpr", jaxpr).invars)
    outputs = tuple(walk(jaxpr, inputs))
    return Program(ops, inputs, outputs, sizes)


def _called(params: dict):
    return next((params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params), None)


def _needed(program: Program) -> list[Op]:
    """The operations that the outputs depend on."""
    wanted, kept = set(program.outputs), []
    for op in reversed(program.ops):
        if wanted.intersection(op.outputs):
            kept.append(op)
            wanted.update(op.inputs)
    return kept[::-1]


def _stored(ops: list[Op], program: Program) -> tuple[set[int], list[set[int]]]:
    """Which variables are stored, and the stored ones that each operation reads."""
    readers: dict[int, list[str]] = {}
    ends: dict[int, set[int]] = {}  # readers of a variable, past what is cheap
    for step, op in reversed(list(enumerate(ops))):
        past = set().union(*(ends.get(v, ()) for v in op.outputs)) if op.name in CHEAP else ()
        for v in set(op.inputs):
            readers.setdefault(v, []).append(op.name)
            ends.setdefault(v, set()).update(past or {step})
    sources = {v: {v} for v in program.inputs}  # variable -> stored ones that it is made from
    stored, reads = set(), []
    for op in ops:
        read = set().union(*(sources.get(v, ()) for v in op.inputs))
        reads.append(read)
        for v in op.outputs:
            names = readers.get(v, [])
            fused = all(name in ELEMENTWISE or name.startswith("reduce_") for name in names)
            few = max(len(names), len(ends.get(v, ()))) <= 1 or op.name in CHEAP
            if op.name in ELEMENTWISE and fused and few and v not in program.outputs:
                sources[v] = read
            elif names or v in program.outputs:
                sources[v] = {v}
                stored.add(v)
    return stored, reads


def _inside(op: Op, size: Callable[[Any], int]) -> int:
    """What an operation needs beside its inputs and outputs while it runs."""
    p = op.params
    if op.name == "scan":
        body = p["jaxpr"]
        if "ft_in" in p:  # jax 0.12
            consts, carry, _ = map(len, p["ft_in"].unpack())
        else:
            consts, carry = p["num_consts"], p["num_carry"]
        slices = sum(size(var.aval) for var in body.jaxpr.invars[consts + carry :])
        return slices + peak(body, size, range(consts, len(body.jaxpr.invars)))
    if op.name == "while":
        body, consts = p["body_jaxpr"], p["body_nconsts"]
        return peak(body, size, range(consts, len(body.jaxpr.invars)))
    if op.name == "cond":
        return max(peak(branch, size) for branch in p["branches"])
    return 0
