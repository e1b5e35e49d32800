"""A language model with adapters, proved: loading, stacking, composition, activations.

Which adapters are active and trainable is measured on the parameters, and a composition is proved on the logits
before anything is sampled from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "activations": ["decoder_layers", "mean_logprobs", "readable"],
        "layers": ["layer_number"],
        "adapters": [
            "WEIGHTS",
            "check_recorded",
            "file_hashes",
            "import_adapter",
            "random_control",
            "save_adapter",
            "save_composed",
        ],
        "load": ["base_name", "load_model", "load_tokenizer", "persona_adapter_folder", "weight_files"],
        "probing": ["Slots"],
        "stacking": ["EM", "stack"],
    },
)
