"""`sft.jsonl` of `agl import` for veRL's SFT trainer, through its setting for a custom dataset class:

    data.train_files=imported/sft.jsonl
    data.custom_cls.path=pkg://agent_lightning.learners.verl_sft data.custom_cls.name=JsonlSFTDataset

veRL's own class reads Parquet, where all rows of a column have the same fields: each tool and each tool call would have
the arguments of all other tools, as nulls.
"""

from __future__ import annotations

import json

import pandas as pd
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.tokenizer.chat_template import extract_system_prompt_and_generation

from agent_lightning.core.errors import DataError


class JsonlSFTDataset(MultiTurnSFTDataset):  # type: ignore[misc]
    """Chats, a JSON object on each line: {"messages": […], "tools": […]}. Raises DataError with file and line."""

    def _read_files_and_process(self) -> None:
        rows = []
        for path in self.parquet_files:
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        rows.append(json.loads(line))
                        rows[-1]["messages"][0]["role"]
                    except (ValueError, KeyError, IndexError, TypeError) as error:
                        raise DataError(f"{path}, line {number}: not a chat of `agl import`") from error
        if 0 < self.max_samples < len(rows):
            sample = pd.Series(range(len(rows))).sample(self.max_samples, random_state=self.seed)
            rows = [rows[i] for i in (sample if self.shuffle else range(self.max_samples))]
        # veRL reads the messages of a row from this column.
        self.dataframe = pd.DataFrame({self.messages_key: [row[self.messages_key] for row in rows]}, dtype=object)
        self.messages = list(self.dataframe[self.messages_key])
        self.tools = [row.get(self.tools_key) or None for row in rows]
        self.enable_thinking = None
        self.system_prompt, self.generation_prompt = extract_system_prompt_and_generation(
            self.tokenizer, **self.apply_chat_template_kwargs
        )
