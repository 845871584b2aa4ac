"""`render_chat`: a conversation as one text, written by a tokenizer's chat template.

Called by whatever encodes chats: engines, and conversations over engines that render none.
"""

from __future__ import annotations

from penstock.api.prompt import Chat
from penstock.errors import RequestError, text_of


def render_chat(tokenizer: object, chat: Chat) -> str:
    """The conversation as one text. Raises `RequestError`, also for whatever the template raises."""
    render = getattr(tokenizer, "apply_chat_template", None)
    if render is None or not getattr(tokenizer, "chat_template", True):  # some tokenizers render without a template
        raise RequestError("this tokenizer has no chat template: pass a string, or set tokenizer.chat_template")
    optional = {"tools": chat.tools, "documents": chat.documents, "continue_final_message": chat.continue_final_message}
    options = {**{name: value for name, value in optional.items() if value}, **chat.arguments}
    try:
        return str(render(chat.messages, add_generation_prompt=chat.add_generation_prompt, tokenize=False, **options))
    except BaseException as error:  # templates raise arbitrary errors for unknown roles and orders
        raise RequestError(f"the chat template refused these messages: {text_of(error)}") from error
