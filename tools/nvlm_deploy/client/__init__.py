"""Clients of the ensemble `nvlm`: questions and images in, streamed answers out."""

from nvlm_deploy.client.aio import AsyncAnswerStream, AsyncNvlmClient
from nvlm_deploy.client.answer import Answer, Piece
from nvlm_deploy.client.exchange import AnswerCancelled
from nvlm_deploy.client.generation import Generation
from nvlm_deploy.client.images import Image
from nvlm_deploy.client.sync import AnswerStream, NvlmClient

__all__ = [
    "Answer",
    "AnswerCancelled",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncNvlmClient",
    "Generation",
    "Image",
    "NvlmClient",
    "Piece",
]
