"""Fixtures of the tests of what `bootstrap` makes."""

import ast
from typing import Any

import pytest


@pytest.fixture
def role_policy(account):
    """A function: a role's name in the template -> the statements of its policy by their names."""

    def read(role: str = "Role") -> dict[str, Any]:
        iam = account.client("iam")
        names = [each["RoleName"] for each in iam.list_roles()["Roles"]]
        (name,) = (each for each in names if each.startswith(f"dalle-{role}"))
        attached = iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]
        for each in attached:
            policy = iam.get_policy_version(PolicyArn=each["PolicyArn"], VersionId="v1")
            statements = policy["PolicyVersion"]["Document"]["Statement"]
            return {statement["Sid"]: statement for statement in statements}
        (kind,) = iam.list_role_policies(RoleName=name)["PolicyNames"]
        policy = iam.get_role_policy(RoleName=name, PolicyName=kind)
        # moto keeps a policy that came by a stack in Python's spelling.
        statements = ast.literal_eval(policy["PolicyDocument"])["Statement"]
        # It also keeps a statement that AWS::NoValue takes out, as None.
        return {statement["Sid"]: statement for statement in statements if statement}

    return read
