"""The reference: Hugging Face's own Llama, Bert and T5, put through the same harness."""

import transformers as hf
from harness import Family, Form

LLAMA = Family(
    "decoder",
    hf.LlamaConfig,
    {
        "base": hf.LlamaModel,
        "causal_lm": hf.LlamaForCausalLM,
        "sequence_classification": hf.LlamaForSequenceClassification,
        "token_classification": hf.LlamaForTokenClassification,
        "question_answering": hf.LlamaForQuestionAnswering,
    },
)
BERT = Family(
    "encoder",
    hf.BertConfig,
    {
        "base": hf.BertModel,
        "masked_lm": hf.BertForMaskedLM,
        "sequence_classification": hf.BertForSequenceClassification,
        "token_classification": hf.BertForTokenClassification,
        "question_answering": hf.BertForQuestionAnswering,
        "multiple_choice": hf.BertForMultipleChoice,
    },
)
# Without T5's classifiers: the family labels with encoders and decoders, and has no such head to set beside them
T5 = Family(
    "encoder_decoder",
    hf.T5Config,
    {
        "base": hf.T5Model,
        "seq2seq_lm": hf.T5ForConditionalGeneration,
    },
)

COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FORMS = [
    Form("Llama", LLAMA, {**COMMON, "num_attention_heads": 2, "num_key_value_heads": 2}),
    Form("Bert", BERT, {**COMMON, "num_attention_heads": 4, "type_vocab_size": 16}),
    Form(
        "T5",
        T5,
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        exclude={
            "test_model_base_model_prefix": "HF's T5 tests skip it: the language model holds both stacks itself",
        },
    ),
]
