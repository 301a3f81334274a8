"""Log probabilities in the forms that clients know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turret_server.serving.request import TokenLogprob


def text_of(token: bytes) -> str:
    r"""The text of a token; of bytes that are no characters `bytes:\xe2\x82`, as OpenAI writes them."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def chat_logprob(found: TokenLogprob, *, with_top: bool = True) -> dict[str, Any]:
    """A token of a chat's answer."""
    shown: dict[str, Any] = {
        "token": text_of(found.token),
        "logprob": found.logprob,
        "bytes": list(found.token),
    }
    if with_top:
        shown["top_logprobs"] = [chat_logprob(each, with_top=False) for each in found.top]
    return shown


def prompt_logprobs(of_prompt: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
    """Those of the prompt as vLLM has them: for each token by token ids; none for the first."""
    return [
        None,
        *(
            {
                str(each.token_id): {
                    "logprob": each.logprob,
                    "rank": each.rank,
                    "decoded_token": text_of(each.token),
                }
                for each in (found, *found.top)
            }
            for found in of_prompt
        ),
    ]
