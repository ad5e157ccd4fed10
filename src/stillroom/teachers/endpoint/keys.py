"""Where a key comes from: an environment variable or a keyring, named in the recipe. All that knows ``keyring``."""

from __future__ import annotations

import os
import re

from stillroom.errors import UsageError, missing_extra

KEYRING = "keyring:"
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")


def key_of(named: str | None) -> str | None:
    """The key itself; None where none is named. Raises UsageError without ever showing what was given for a name."""
    if named is None:
        return None
    if named.startswith(KEYRING):
        return _from_keyring(named.removeprefix(KEYRING))
    check_name(named)
    key = os.environ.get(named, "").strip()
    if not key:
        raise UsageError(f"the environment variable {named} is not set. Put the key there, and only there.")
    return key


def check_name(named: str) -> None:
    """Refuse what looks like a key itself: recipes are kept, and shown."""
    if not named.startswith(KEYRING) and not VARIABLE.fullmatch(named):
        raise UsageError(
            "key: name the environment variable that holds the key (such as OPENAI_API_KEY), or keyring:SERVICE/USER; "
            "never the key itself. What was given is not shown here."
        )


def _from_keyring(place: str) -> str:
    service, _, user = place.rpartition("/")
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError as error:
        raise missing_extra("keyring", "keyring") from error
    try:
        key = keyring.get_password(service, user)
    except KeyringError as error:
        raise UsageError(f"the keyring does not open ({type(error).__name__}). Unlock it, or use a variable.") from None
    if not key:
        raise UsageError(f"the keyring has no key for {service!r}, user {user!r}: keyring set {service} {user}")
    return key
