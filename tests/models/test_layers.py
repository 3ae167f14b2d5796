import pytest

from clip_retrieval.models.layers import place_parameters
from tests.models.small import small_towers

VIT_TEXT = {
    "token_embedding.weight": ("text", 3),
    "positional_embedding": ("text", 3),
    "transformer.resblocks.0.attn.in_proj_weight": ("text", 2),
    "transformer.resblocks.1.mlp.c_fc.bias": ("text", 1),
    "ln_final.weight": ("text", 0),
    "text_projection": ("head", 0),
    "logit_scale": ("head", 0),
}

PLACES = {
    "vit": VIT_TEXT
    | {
        "visual.conv1.weight": ("image", 3),
        "visual.class_embedding": ("image", 3),
        "visual.positional_embedding": ("image", 3),
        "visual.ln_pre.bias": ("image", 3),
        "visual.transformer.resblocks.0.ln_1.weight": ("image", 2),
        "visual.transformer.resblocks.1.attn.out_proj.weight": ("image", 1),
        "visual.ln_post.weight": ("image", 0),
        "visual.proj": ("head", 0),
    },
    "custom text": {"text." * (name != "logit_scale") + name: place for name, place in VIT_TEXT.items()},
    "resnet": {
        "visual.conv1.weight": ("image", 5),
        "visual.bn3.bias": ("image", 5),
        "visual.layer1.0.conv1.weight": ("image", 4),
        "visual.layer2.0.bn2.weight": ("image", 3),
        "visual.layer3.0.downsample.0.weight": ("image", 2),
        "visual.layer4.0.conv3.weight": ("image", 1),
        "visual.attnpool.q_proj.weight": ("image", 0),
        "visual.attnpool.positional_embedding": ("image", 0),
        "visual.attnpool.c_proj.weight": ("head", 0),
    },
    "simple-clip": {
        "visual.trunk.conv1.weight": ("image", 5),
        "visual.trunk.layer1.1.conv2.weight": ("image", 4),
        "visual.trunk.layer4.0.conv1.weight": ("image", 1),
        "visual.head.0.weight": ("head", 0),
        "text.transformer.embeddings.word_embeddings.weight": ("text", 3),
        "text.transformer.transformer.layer.0.attention.q_lin.weight": ("text", 2),
        "text.transformer.transformer.layer.1.ffn.lin1.weight": ("text", 1),
        "text.proj.2.weight": ("head", 0),
    },
    "hugging face": {
        "text.transformer.embeddings.position_embeddings.weight": ("text", 2),
        "text.transformer.encoder.layer.0.output.dense.weight": ("text", 1),
        "text.transformer.pooler.dense.weight": ("text", 0),
        "text.proj.0.weight": ("head", 0),
    },
    "siglip": {  # timm's test_vit has six blocks; timm counts the last norm to the last block
        "visual.trunk.patch_embed.proj.weight": ("image", 7),
        "visual.trunk.pos_embed": ("image", 7),
        "visual.trunk.blocks.0.attn.qkv.weight": ("image", 6),
        "visual.trunk.blocks.5.mlp.fc1.weight": ("image", 1),
        "visual.trunk.norm.weight": ("image", 1),
        "visual.trunk.attn_pool.latent": ("image", 0),
    },
    "timm": {
        "visual.trunk.conv1.0.weight": ("image", 5),
        "visual.trunk.layer1.0.conv1.weight": ("image", 4),
        "visual.trunk.layer4.0.conv1.weight": ("image", 1),
        "visual.head.proj.weight": ("head", 0),
    },
}


@pytest.mark.parametrize("kind", PLACES)
def test_depth_of_each_layer_is_that_of_the_table(kind):
    clip, _ = small_towers(kind)
    places = place_parameters(clip)
    assert places.keys() == dict(clip.named_parameters()).keys()
    assert {name: tuple(places[name]) for name in PLACES[kind]} == PLACES[kind]
