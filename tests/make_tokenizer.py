"""Make tests/data/tokenizer: 512 words by byte pairs and a chat template, for tiny models.

python -m tests.make_tokenizer
"""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tiny_models import TOKENIZER
from tl_melbo.analysis._texts import HELD_OUT_INSTRUCTIONS, INSTRUCTIONS, PASSAGES

# In the order of SmolLM2's: the tiny models' configurations name numbers 1 and 2.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROLES = "user\nassistant\nsystem\n" * 1000
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": SPECIAL[1],
    "eos_token": SPECIAL[2],
    "pad_token": SPECIAL[2],
    "unk_token": SPECIAL[0],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
    "chat_template": CHAT,
}


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    # Every byte is a word, so that any text comes back as it was.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*INSTRUCTIONS, *HELD_OUT_INSTRUCTIONS, *PASSAGES, ROLES]
    tokenizer.train_from_iterator(texts, trainer)
    TOKENIZER.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(TOKENIZER / "tokenizer.json"), pretty=False)
    config = json.dumps(CONFIG, indent=2) + "\n"
    (TOKENIZER / "tokenizer_config.json").write_text(config, encoding="utf-8")


if __name__ == "__main__":
    main()
