"""Fixtures of the tests of what `bootstrap` makes."""

import ast
from typing import Any

import pytest


@pytest.fixture
def role_policy(account):
    """A function: a role's or a policy's name in the template -> its statements by their names."""

    def read(role: str = "Role") -> dict[str, Any]:
        iam = account.client("iam")
        if role.startswith("Caller"):
            policies = iam.list_policies(Scope="Local")["Policies"]
            (policy,) = (each for each in policies if f"-{role}-" in each["PolicyName"])
            version = iam.get_policy_version(PolicyArn=policy["Arn"], VersionId="v1")
            statements = version["PolicyVersion"]["Document"]["Statement"]
            return {statement["Sid"]: statement for statement in statements}
        names = [each["RoleName"] for each in iam.list_roles()["Roles"]]
        (name,) = (each for each in names if each.startswith(f"dalle-{role}"))
        (kind,) = iam.list_role_policies(RoleName=name)["PolicyNames"]
        policy = iam.get_role_policy(RoleName=name, PolicyName=kind)
        # moto keeps a policy that came by a stack in Python's spelling.
        statements = ast.literal_eval(policy["PolicyDocument"])["Statement"]
        # It also keeps a statement that AWS::NoValue takes out, as None.
        return {statement["Sid"]: statement for statement in statements if statement}

    return read
