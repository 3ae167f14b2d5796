"""What a run imports, imported before it is forked."""

import torch.utils.tensorboard  # noqa: F401
import transformers  # noqa: F401
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer  # noqa: F401

from clip_retrieval.data.catalog import READERS

for name in set(READERS.values()):
    __import__(f"clip_retrieval.data.readers.{name}")
