"""Sets images of a training split aside, so that choices can be made without looking at val.

    python benchmarks/hold_out.py --shards data_shards/coco_mini --split train2017 --every 5

Every n-th image of the split, in the order of the shards, goes into the split `held`, the others into `kept`, in the
same folder. The rule looks at positions only, never at scores.
"""

import argparse
from pathlib import Path

from osm_lightning.data.stream import ShardSet
from osm_lightning.shards.write import ShardWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="shard folder")
    parser.add_argument("--split", required=True, help="split to divide")
    parser.add_argument("--every", type=int, default=5, help="one image in so many is set aside")
    args = parser.parse_args()
    shards = ShardSet(args.shards, args.split)
    for split, wanted in (("kept", False), ("held", True)):
        index = shards.index
        with ShardWriter(
            args.shards, dataset=index.dataset, split=split, vocabulary=index.vocabulary, overwrite=True
        ) as writer:
            positions = [i for i in range(len(shards)) if (i % args.every == args.every - 1) == wanted]
            for position in positions:
                writer.write(shards[position])
        print(f"{split}: {len(positions)} images")


if __name__ == "__main__":
    main()
