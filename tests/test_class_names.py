"""Names of classes where a decoder is evaluated on data that calls them otherwise."""

from types import SimpleNamespace

import layouts
import pytest

from datasetdm_fast.errors import Refused
from datasetdm_fast.evaluate import main as evaluate
from datasetdm_fast.training.evaluation import naming
from datasetdm_fast.training.evaluation.settings import EvaluateConfig
from datasetdm_fast.training.readers import open_data


def test_several_data_sets_and_names_of_classes(tmp_path, capsys):
    assert EvaluateConfig(data="voc:a,b[val],coco:c").addresses == ["voc:a,b[val]", "coco:c"]
    layouts.voc(tmp_path)
    data = f"demo:1@5,voc:{tmp_path}[val]"
    line = ["--data", data, "--task", "semantic", "--bootstrap", "0", "--quiet"]
    assert evaluate([*line, "--class-names", "bicycle=ball,auto"]) == 0
    said = capsys.readouterr().out
    assert f"voc:{tmp_path}[val]" in said and "  ball" in said and "mIoU of" in said and "  bicycle" not in said
    assert (
        evaluate([*line, "--class-names", "zebra=ball"]) == 2 and "--class-names zebra=ball" in capsys.readouterr().err
    )
    assert evaluate([*line, "--class-names", "cat=dog"]) == 2 and "two classes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["voc", "cityscapes"])
def test_captions_made_of_labels_say_the_names_that_a_decoder_has(name, tmp_path):
    kind, write, _ = layouts.LAYOUTS[name]
    write(tmp_path)
    caption = open_data(f"{kind}:{tmp_path}", 64)[0].caption
    shown = next(one for one in open_data(f"{kind}:{tmp_path}", 64).thing_classes if one in caption)
    source = naming.rename(open_data(f"{kind}:{tmp_path}", 64), {shown: "zebra"}, ("zebra",), is_auto=False)
    assert source[0].caption == caption.replace(shown, "zebra") != caption


def test_classes_are_renamed_by_pairs_and_by_the_table_to_no_name_that_is_there_already():
    def called(pairs, is_auto, *names):
        source = SimpleNamespace(classes=("background", *names), thing_classes=names)
        found = naming.rename(source, pairs, ("couch", "dining table"), is_auto=is_auto)
        assert found.classes == ("background", *found.thing_classes) and (found is source) == (not source.called)
        return found.thing_classes

    assert called({}, False, "sofa", "diningtable") == ("sofa", "diningtable")
    assert called({"sofa": "couch"}, False, "sofa", "diningtable") == ("couch", "diningtable")
    assert called({"sofa": "couch"}, True, "sofa", "diningtable") == ("couch", "dining table")
    assert called({"sofa": "dining table"}, True, "sofa", "diningtable") == ("dining table", "diningtable")
    assert called({}, True, "dining table", "diningtable") == ("dining table", "diningtable")
    assert called({}, True, "couch or dining table") == ("couch or dining table",)  # either of them
    with pytest.raises(Refused, match="two classes of the data would be mug"):
        called({"sofa": "mug"}, False, "sofa", "mug")
