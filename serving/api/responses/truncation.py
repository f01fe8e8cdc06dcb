"""`truncation: auto` of /v1/responses: a conversation that is too long loses its oldest turns."""

from msgspec.structs import replace

from dispec.engine.errors import ContextOverflow
from dispec.serving.api.chat_request import chat_prompt
from dispec.serving.api.context import ServedModel
from dispec.serving.api.protocol import ChatRequest
from dispec.serving.api.responses.input_items import Conversation


async def drop_oldest_turns(model: ServedModel, chat: ChatRequest, conversation: Conversation) -> None:
    """Remove from a conversation that does not fit the fewest turns that make it fit, or all but the last.

    A turn begins with a message of the user. Instructions and system messages before the first one stay.
    """
    messages = conversation.messages
    turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(turns) < 2:
        return
    first, cuts = turns[0], turns[1:]
    low, high = 0, len(cuts) - 1
    while low < high:  # each try tokenizes a prompt
        middle = (low + high) // 2
        if await _fits(model, replace(chat, messages=messages[:first] + messages[cuts[middle] :])):
            high = middle
        else:
            low = middle + 1
    del messages[first : cuts[low]], conversation.places[first : cuts[low]]


async def _fits(model: ServedModel, chat: ChatRequest) -> bool:
    try:
        prompt = await chat_prompt(model, chat)
    except ContextOverflow:
        return False
    return len(prompt.token_ids) < model.info.max_model_len
