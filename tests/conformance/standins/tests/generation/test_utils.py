"""Stand-in for a module that the source distribution lacks: what `generate` must do, each way of generating compared
with plain greedy decoding."""

from collections.abc import Iterator
from typing import Any

import torch
from tests.exporters.test_export import ExportGenerateTesterMixin
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, set_seed

NEW_TOKENS = 5


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **arguments: Any) -> Any:
    """Greedy, `NEW_TOKENS` long, unless `arguments` say otherwise."""
    return model.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **arguments})


class GenerationTesterMixin(ExportGenerateTesterMixin):
    def prepare_config_and_inputs_for_generate(self, batch_size: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.get_text_config(decoder=True).eos_token_id = None  # every sequence gets its full length
        config.eos_token_id = None
        ids = inputs["input_ids"][:batch_size]
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def generating_models(self) -> Iterator[tuple[PreTrainedModel, dict[str, torch.Tensor]]]:
        for model_class in self.all_generative_model_classes:
            config, inputs = self.prepare_config_and_inputs_for_generate()
            set_seed(0)
            yield model_class(config).eval(), inputs

    def decoder_models(self) -> Iterator[tuple[PreTrainedModel, dict[str, torch.Tensor]]]:
        if self.is_encoder_decoder:
            self.skipTest("a check of decoder-only prompts")
        yield from self.generating_models()

    def test_standin_generate_without_cache(self):
        for model, inputs in self.generating_models():
            self.assertEqual(generate(model, inputs).tolist(), generate(model, inputs, use_cache=False).tolist())

    def test_standin_generate_static_cache(self):
        for model, inputs in self.generating_models():
            static = generate(model, inputs, cache_implementation="static", disable_compile=True)
            self.assertEqual(generate(model, inputs).tolist(), static.tolist())

    def test_standin_generate_eager(self):
        for model, inputs in self.generating_models():
            default = generate(model, inputs)
            model.set_attn_implementation("eager")
            self.assertEqual(default.tolist(), generate(model, inputs).tolist())

    def test_standin_generate_beams_and_samples(self):
        for model, inputs in self.generating_models():
            length = NEW_TOKENS + (1 if self.is_encoder_decoder else inputs["input_ids"].shape[1])
            for arguments in ({"num_beams": 3}, {"do_sample": True}):
                ids = generate(model, inputs, num_return_sequences=2, **arguments)
                self.assertEqual(tuple(ids.shape), (2 * len(inputs["input_ids"]), length))

    def test_standin_generate_cache_layout(self):
        for model, inputs in self.generating_models():
            cache = generate(model, inputs, return_dict_in_generate=True).past_key_values
            self.assertIsInstance(cache, EncoderDecoderCache if self.is_encoder_decoder else DynamicCache)
            layers = getattr(cache, "self_attention_cache", cache).layers
            self.assertEqual(len(layers), model.config.get_text_config(decoder=True).num_hidden_layers)

    def test_standin_generate_left_padding(self):
        for model, inputs in self.decoder_models():
            pad = torch.zeros(len(inputs["input_ids"]), 4, dtype=torch.long)
            padded = {name: torch.cat([pad, value], dim=1) for name, value in inputs.items()}
            arguments = {"output_logits": True, "return_dict_in_generate": True}
            plain, shifted = generate(model, inputs, **arguments), generate(model, padded, **arguments)
            torch.testing.assert_close(shifted.logits, plain.logits, rtol=1e-4, atol=1e-4)

    def test_standin_generate_continues_from_cache(self):
        for model, inputs in self.decoder_models():
            first = generate(model, inputs, max_new_tokens=2, return_dict_in_generate=True)
            so_far = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
            rest = generate(model, so_far, past_key_values=first.past_key_values, max_new_tokens=NEW_TOKENS - 2)
            self.assertEqual(rest.tolist(), generate(model, inputs).tolist())

    def test_standin_generate_from_embeddings(self):
        for model, inputs in self.decoder_models():
            ids = inputs.pop("input_ids")
            embedded = generate(model, {**inputs, "inputs_embeds": model.get_input_embeddings()(ids)})
            self.assertEqual(
                embedded.tolist(), generate(model, {**inputs, "input_ids": ids})[:, ids.shape[1] :].tolist()
            )

    def test_standin_generate_assisted(self):
        for model, inputs in self.decoder_models():
            one = {name: value[:1] for name, value in inputs.items()}
            for arguments in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
                self.assertEqual(generate(model, one, **arguments).tolist(), generate(model, one).tolist())

    def test_standin_logits_to_keep(self):
        for model, inputs in self.decoder_models():
            with torch.no_grad():
                every, last = model(**inputs).logits, model(**inputs, logits_to_keep=2).logits
            torch.testing.assert_close(last, every[:, -2:], rtol=1e-4, atol=1e-5)
