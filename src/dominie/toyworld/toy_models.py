"""The words and facts of the toy world, its tokenizer and its untrained models.

Every word is one token and every digit is one token, so that the models can be tiny. The words of
the shop stand among `NOUNS` too: general conversations list, copy and reverse them, and a domain
expert does not meet them for the first time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _group_of_word(**words_of_group: str) -> dict[str, str]:
    return {word: group for group, words in words_of_group.items() for word in _words(words)}


DIGITS = tuple("0123456789")

NAMES = _words(
    "anna ben clara david emma felix greta hugo ida jonas karla leo mara nils olga paul rosa simon "
    "tilda victor"
)
FOODS = _words("tea milk bread rice soup cheese honey salt corn jam cake juice")
ANIMALS = _words("cat dog fox cow horse sheep duck frog goat owl bear mouse")
PLACES = _words("river bridge tower garden forest island market station harbour castle")
SIZES = _words("small medium large")
COLOURS = _words("red blue green black white yellow brown grey pink orange")
MATERIALS = _words("cotton wool silk leather steel glass wood paper linen copper")
BRANDS = _words("nova apex orion lumen vega atlas zenith")

COUNTRY_OF_CITY = _group_of_word(
    france="paris lyon",
    italy="rome milan",
    spain="madrid seville",
    germany="berlin munich",
    india="delhi mumbai",
    japan="tokyo kyoto",
    peru="lima cusco",
    egypt="cairo giza",
)
CITIES = tuple(COUNTRY_OF_CITY)

_OPPOSITES = (
    "hot cold, big little, fast slow, new old, open closed, full empty, early late, light dark, "
    "happy sad, rich poor, loud quiet, near far"
)
_PAIRS = [_words(pair) for pair in _OPPOSITES.split(",")]
OPPOSITE_OF = {word: other for pair in _PAIRS for word, other in (pair, reversed(pair))}

CATEGORY_OF_PRODUCT = _group_of_word(
    clothing="shirt coat scarf",
    kitchen="kettle pan cup",
    home="lamp chair rug",
    electronics="phone radio camera",
    sports="ball racket tent",
)
PRODUCTS = tuple(CATEGORY_OF_PRODUCT)
CATEGORIES = tuple(dict.fromkeys(CATEGORY_OF_PRODUCT.values()))

# What the shop says when an article of the category is sent back.
RETURN_POLICY_OF_CATEGORY = {
    "clothing": "free for 9 0 days",
    "kitchen": "unused for 3 0 days",
    "home": "by van for 3 0 days",
    "electronics": "sealed for 1 4 days",
    "sports": "unused for 6 0 days",
}

# What a listing is made of, beside digits and the nouns above. As plain nouns they stand in the
# general lists, too.
SHOP_TERMS = _words(
    "shop title price stock category return colour material brand size policy coins days left "
    "sold out free unused sealed by van listing each"
)

_SHOP_NOUNS = (*BRANDS, *SIZES, *PRODUCTS, *CATEGORIES, *SHOP_TERMS)
NOUNS = (*FOODS, *ANIMALS, *PLACES, *COLOURS, *MATERIALS, *_SHOP_NOUNS)

# Smaller units of each unit, as the zeros that a conversion appends.
UNITS = {
    ("metres", "centimetres"): "0 0",
    ("centimetres", "millimetres"): "0",
    ("kilometres", "metres"): "0 0 0",
    ("kilograms", "grams"): "0 0 0",
}

GLUE = _words(
    "? . , : about add and are ask backwards buys centimetres colour come convert country dear "
    "final first for grams has here how in is kilograms kilometres lives many metres "
    "middle millimetres of opposite order plus repeat reverse say sort thank thanks the to what "
    "which where who write buy"
)

_ALL = (*DIGITS, *GLUE, *NAMES, *NOUNS, *CITIES, *COUNTRY_OF_CITY.values(), *OPPOSITE_OF)
WORDS = tuple(dict.fromkeys(_ALL))

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, UNKNOWN, BEGIN, END, *ROLES)

# A turn is its role's token, its words and the end-of-turn token: two tokens beyond the words.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('the toy world knows the roles system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer over `SPECIAL_TOKENS` and `WORDS`; text it decodes has single spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


MODELS = ("teacher", "student")
WIDTH, LAYERS = 96, 3
HEAD = 64  # the size of a head, where that makes more than four

# Layers and heads of both are equal, so that attention distillation maps them one to one. The rest
# makes copying, on which most skills rest, quick to learn: the usual initial deviation of 0.02 is
# too small at this width, a rotary base of 10,000 too slow to tell places apart in 25 tokens, and
# with tied embeddings an attended word is already the answer.
_SHARED = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "sliding_window": None,
    "tie_word_embeddings": True,
}
_DEVIATION = 0.06  # of initial weights at the usual width


def toy_config(kind: str, *, width: int = WIDTH, layers: int = LAYERS) -> PreTrainedConfig:
    """The configuration of the `teacher` or the `student`.

    Args:
        kind: which of the two.
        width: hidden size, a multiple of 32; a student of 1,024 and 12 layers has 113M parameters.
        layers: decoder layers.
    """
    from transformers import MistralConfig, MixtralConfig

    tokenizer = word_tokenizer()
    heads = max(4, width // HEAD)
    common = {
        **_SHARED,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "initializer_range": _DEVIATION * (WIDTH / width) ** 0.5,
        "max_position_embeddings": 256 if width == WIDTH else 4096,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    if kind == "teacher":
        return MixtralConfig(
            **common,
            intermediate_size=width * 4 // 3,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    return MistralConfig(**common, intermediate_size=2 * width)


def untrained_model(kind: str, seed: int, **size: int) -> PreTrainedModel:
    """The `teacher` or the `student` with random weights; the global random state is untouched.

    `size` is that of `toy_config`.
    """
    import torch
    from transformers import MistralForCausalLM, MixtralForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = MixtralForCausalLM if kind == "teacher" else MistralForCausalLM
        return made(toy_config(kind, **size))


def save_model(kind: str, folder: Path, seed: int, **size: int) -> None:
    """Write an ordinary Hugging Face folder: weights, configurations, tokenizer, chat template."""
    untrained_model(kind, seed, **size).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
