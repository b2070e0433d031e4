"""What the grader runs inside a submission's kernel: limits, and calls of the student's functions.

The source of this file is sent to the kernel as text, where alignkit itself cannot be imported. It knows neither the
right answers nor the marks: it returns what the student's functions returned, and the grader's process judges that.
"""

import json
import math
import sys

MOST_NUMBERS = 5000  # in one answer
LONGEST_TEXT = 200  # characters of a text or an error message in an answer


def start(memory: int, file_bytes: int, seconds: int, hidden: list[str]) -> None:
    """Limit this process, and make the modules `hidden` impossible to import by name.

    memory: bytes of address space above what is used now; file_bytes: the largest file that may be written; seconds:
    CPU time. Where the system has no such limits (Windows; memory on macOS) they are left out.
    """
    for name in [module for module in sys.modules if module.split(".")[0] in hidden] + hidden:
        sys.modules[name] = None
    try:
        import resource
    except ImportError:
        return
    limits = {resource.RLIMIT_FSIZE: file_bytes, resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0}
    try:
        with open("/proc/self/statm") as file:
            limits[resource.RLIMIT_AS] = int(file.read().split()[0]) * resource.getpagesize() + memory
    except OSError:
        pass
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


class Answers:
    """The results of calls, which IPython sends as JSON."""

    def __init__(self, results: list[dict]):
        self.results = results

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return {"application/json": {"results": self.results}}


def answers(function, calls: str) -> Answers:
    """Call `function` once for each entry of `calls`, JSON as `grading.packed` makes it; returns what came of it.

    Each result is {"value": …} (see `packed_answer`) or {"error": text}. An entry is {"arguments": […], "gradient":
    None or the position of an argument}: with a position the value is the gradient of the sum of the result by it.
    """
    results = []
    for call in json.loads(calls):
        try:
            if function is None:
                raise NotImplementedError("not answered")
            arguments = [_argument(each) for each in call["arguments"]]
            value = _gradient(function, arguments, call["gradient"]) if call["gradient"] is not None else function(
                *arguments)
            results.append({"value": packed_answer(value, [MOST_NUMBERS])})
        except BaseException as error:  # a student's SystemExit too
            results.append({"error": f"{type(error).__name__}: {str(error)[:LONGEST_TEXT]}"})
    return Answers(results)


def _argument(value):
    if isinstance(value, dict) and "tensor" in value:
        import torch

        return torch.tensor([float(each) for each in value["tensor"]], dtype=torch.float64).reshape(
            value["shape"]).to(getattr(torch, value["dtype"]))
    if isinstance(value, dict):
        return {name: _argument(each) for name, each in value.items()}
    return [_argument(each) for each in value] if isinstance(value, list) else value


def _gradient(function, arguments: list, position: int):
    arguments[position].requires_grad_()
    result = function(*arguments)
    result.sum().backward()
    return arguments[position].grad


def packed_answer(value, left: list[int]):
    """An answer as JSON: numbers (those that are not finite as text), {"text": …}, null, and lists of them.

    left: a list that holds the count of numbers that may still come. Raises ValueError if there are more, TypeError on
    other types.
    """
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"the answer has more than {MOST_NUMBERS} parts")
    if type(value).__module__.split(".")[0] == "torch" and hasattr(value, "detach"):
        return packed_answer(value.detach().double().tolist(), left)
    if hasattr(value, "tolist") and not isinstance(value, (list, tuple)):
        return packed_answer(value.tolist(), left)
    if value is None:
        return None
    if isinstance(value, (bool, int, float)):
        number = float(value)
        return number if math.isfinite(number) else repr(number)
    if isinstance(value, str):
        return {"text": value[:LONGEST_TEXT]}
    if isinstance(value, (list, tuple)):
        return [packed_answer(each, left) for each in value]
    raise TypeError(f"a result of type {type(value).__name__} is no number, text, tensor, list or tuple")
