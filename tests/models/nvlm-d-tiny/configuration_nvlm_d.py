"""What `auto_map` in config.json points to, cut down to what a reader of this folder needs."""

from transformers import PretrainedConfig, Qwen2Config


class NVLM_D_Config(PretrainedConfig):  # noqa: N801
    model_type = "NVLM_D"
    has_no_defaults_at_init = True

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        # Before super().__init__: it already asks for the text config. The file says "llama" for a Qwen2 model.
        qwen2 = {key: value for key, value in (llm_config or {}).items() if key != "model_type"}
        self.llm_config = self.text_config = Qwen2Config(**qwen2)
        self.vision_config = PretrainedConfig(**{"norm_type": "rms_norm", **(vision_config or {})})
        super().__init__(**kwargs)
