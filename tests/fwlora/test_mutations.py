"""The method's tests fail if its code is wrong: each mutant is a mistake made on purpose, which a test must catch.

pytest tests/fwlora/test_mutations.py
"""

from __future__ import annotations

import importlib
import inspect

import pytest
import test_method
import test_tensor_functions

import fwlora

# (module, the right code, the mistake, the test that must fail)
MUTANTS = {
    "A and B swapped in the gradient": (
        "penalty",
        "return ((b.mT @ b) * twice) @ a, b @ ((a @ a.mT) * twice)",
        "return ((a @ a.mT) * twice) @ a, b @ ((b.mT @ b) * twice)",
        lambda: test_method.test_closed_form_gradient_is_autograds("linear", "update"),
    ),
    "the factor 2 of the gradient dropped": (
        "penalty",
        "twice = 2.0 * c[:, None, None]",
        "twice = c[:, None, None]",
        lambda: test_method.test_closed_form_gradient_is_autograds("linear", "factors"),
    ),
    "s² dropped": (
        "penalty_step",
        'if self._config.penalty_norm == "update":',
        'if self._config.penalty_norm == "nothing":',
        lambda: test_method.test_closed_form_gradient_is_autograds("rank_pattern", "update"),
    ),
    "s instead of s²": (
        "penalty_step",
        ".square().to(weights)",
        ".to(weights)",
        lambda: test_method.test_100_steps_equal_the_naive_oracle("linear", "loss", "update"),
    ),
    "the sign of the decoupled step flipped": (
        "penalty_step",
        "[-lr * piece for piece",
        "[lr * piece for piece",
        lambda: test_method.test_100_steps_equal_the_naive_oracle("linear", "decoupled", "update"),
    ),
    "F not normalised": (
        "weighting",
        "return fisher / fisher.sum()",
        "return fisher",
        lambda: test_method.test_100_steps_equal_the_naive_oracle("linear", "loss", "update"),
    ),
    "importance used as the weight": (
        "weighting",
        "weights = 1.0 - importance(fisher)\n",
        "weights = importance(fisher)\n",
        lambda: test_method.test_100_steps_equal_the_naive_oracle("linear", "loss", "factors"),
    ),
    "the two halves of the average swapped": (
        "estimators",
        "decay * fisher + (1.0 - decay) * step",
        "(1.0 - decay) * fisher + decay * step",
        lambda: test_tensor_functions.test_update_average_by_hand("raw", [1.1, 1.9]),
    ),
    "G and X swapped": (
        "estimators",
        "return _rows(g).to(dtype).T @ _rows(x).to(dtype)",
        "return _rows(x).to(dtype).T @ _rows(g).to(dtype)",
        test_tensor_functions.test_weight_gradient_by_hand,
    ),
    "the norm not squared": (
        "estimators",
        "/ loss_scale).square()",
        "/ loss_scale)",
        lambda: test_method.test_exact_is_the_gradient_of_an_unfrozen_twin("linear", 1),
    ),
    "the warm-up one step too long": (
        "method",
        "return self.step == self.warmup_steps\n",
        "return self.step == self.warmup_steps + 1\n",
        lambda: test_method.test_100_steps_equal_the_naive_oracle("linear", "loss", "update"),
    ),
    "the penalty not scaled for a fused optimizer": (
        "penalty_step",
        "if in_loss and loss_scale is not None:",
        "if False:",
        lambda: test_method.test_grad_scaler_changes_nothing(True, False, "loss"),
    ),
    "micro-batches averaged after the norm": (
        "capture",
        "self._sums[index] = before.add_(part.statistic)",
        "self._sums[index] = part.statistic",
        lambda: test_method.test_exact_is_the_gradient_of_an_unfrozen_twin("linear", 2),
    ),
}


def caught(test) -> bool:
    try:
        test()
    except (AssertionError, RuntimeError, ValueError, TypeError):
        return True
    except Exception as error:  # the shape checks raise errors of their own
        return type(error).__name__ in ("TypeCheckError", "BeartypeCallHintParamViolation")
    return False


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant, monkeypatch):
    name, right, wrong, test = MUTANTS[mutant]
    assert not caught(test), "the test passes on the code as it is"
    module = importlib.import_module(f"fwlora.{name}")
    source = inspect.getsource(module)
    assert source.count(right) >= 1, f"fwlora.{name} no longer holds {right!r}: rewrite this mutant"
    mutated = dict(vars(module))
    exec(compile(source.replace(right, wrong), module.__file__ or name, "exec"), mutated)
    for key, value in mutated.items():
        old = getattr(module, key, None)
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and old is not value:
            # The new function takes the old one's place wherever it was imported to.
            for user in ("estimators", "weighting", "penalty", "penalty_step", "capture", "method"):
                where = importlib.import_module(f"fwlora.{user}")
                if getattr(where, key, None) is old:
                    monkeypatch.setattr(where, key, value)
    if name == "method":
        monkeypatch.setattr(fwlora, "attach", mutated["attach"])
    assert caught(test), f"no test noticed: {mutant}"
