"""The OpenAI API as it is spoken here: requests read strictly, replies, errors in its shape."""

from star_elastic.serve.schema.body import read
from star_elastic.serve.schema.errors import BadRequest, error_body
from star_elastic.serve.schema.limits import Limits, check_fits, size_of
from star_elastic.serve.schema.replies import (
    Answer,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    ElasticReport,
    Model,
    ModelList,
    TokenLogprob,
    Usage,
    model_list,
)
from star_elastic.serve.schema.requests import ChatRequest, CompletionRequest, Message, Wanted
from star_elastic.serve.schema.thinking import ThinkingBudget, thinking_budget

__all__ = [
    "Answer",
    "BadRequest",
    "ChatChoice",
    "ChatChunk",
    "ChatCompletion",
    "ChatLogprobs",
    "ChatRequest",
    "ChatTokenLogprob",
    "ChunkChoice",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionRequest",
    "Delta",
    "ElasticReport",
    "Limits",
    "Message",
    "Model",
    "ModelList",
    "ThinkingBudget",
    "TokenLogprob",
    "Usage",
    "Wanted",
    "check_fits",
    "error_body",
    "model_list",
    "read",
    "size_of",
    "thinking_budget",
]
