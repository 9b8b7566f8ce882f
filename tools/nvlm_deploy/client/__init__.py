"""Clients of the ensemble `nvlm`: questions and images in, streamed answers out."""

from nvlm_deploy.client.aio import AsyncNvlmClient
from nvlm_deploy.client.answer import Answer, Piece
from nvlm_deploy.client.request import Generation, Image
from nvlm_deploy.client.sync import AnswerStream, NvlmClient

__all__ = ["Answer", "AnswerStream", "AsyncNvlmClient", "Generation", "Image", "NvlmClient", "Piece"]
