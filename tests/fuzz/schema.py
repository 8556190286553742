"""Requests that schemathesis makes from `/openapi.json`, at the real `serve`, from a seed.

Half of them suit the document, half do not. Each reply must have a status, headers, a media type
and a body that the document has for its route; none is a 500, and no log line is of a traceback.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from typing import Any

import hypothesis
import schemathesis
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.inference.served import Served

# A 503 and a 504 are replies of the document. A caption of blanks suits the schema and is refused,
# and of the routes without parameters no wrong request can be made.
_NOT_CHECKED = ("not_a_server_error", "positive_data_acceptance")
_LIGHT_CASES = 20  # most of a route without a body


def fuzz(served: Served, num_cases: int, seed: int) -> Counter[str]:
    """Send about so many requests; count the statuses.

    Raises AssertionError, or what schemathesis raises, for the first reply that the document does
    not have, with a command that sends its request again.
    """
    with tempfile.TemporaryDirectory() as scratch:  # it would be in the checkout
        set_hypothesis_home_dir(scratch)
        return _fuzz(served, num_cases, seed)


def _fuzz(served: Served, num_cases: int, seed: int) -> Counter[str]:
    load_all_checks()
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]
    heavy = [each for each in operations if each.body]
    counts: Counter[str] = Counter()
    for operation in operations:
        number = num_cases // len(heavy) if operation in heavy else _LIGHT_CASES
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _send(operation, mode, max(1, number // 2), seed, counts)
    faults = [line for line in served.lines if "Traceback" in line or "internal error" in line]
    assert faults == [], "\n".join(served.lines[-60:])
    return counts


def _send(
    operation: Any, mode: GenerationMode, number: int, seed: int, counts: Counter[str]
) -> None:
    excluded = [CHECKS.get_one(name) for name in _NOT_CHECKED]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        try:
            response = case.call()
        except ValueError as error:  # schemathesis cannot write every form that it makes up
            hypothesis.assume("Unsupported type" not in str(error))
            raise
        counts[f"schema {response.status_code}"] += 1
        assert response.status_code != 500, case.as_curl_command()
        case.validate_response(response, excluded_checks=excluded)

    try:
        send()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, operation.label
