"""MetaCLIP 2: CLIP whose end-of-text token is the one its config names, be it number 2."""

from mmjax.convert.families.clip import register

register("MetaClip2", "metaclip_2", legacy=None)
