"""Where samples go: decided before anything is drawn, and never over what is no sample."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile, ZipFile

from PIL.PngImagePlugin import PngImageFile

from difftrain.sampling.pictures import numbered
from difftrain.training.folder import FolderError, free

PICTURES, ARRAYS = ".png", ".npz"  # how files of samples end
MARK = "graph"  # every sample says by which graph it was made
OTHER = "holds no samples"


def places(name: str, ending: str, out: str | None, save: str | None) -> tuple[Path, Path]:
    """The file of samples of a run, and where each of them goes beside it: `save`, or a folder.
    Raises FolderError for a place that is taken or cannot be written."""
    usual = f"{name}{ending}" if ending == PICTURES else f"{name}-samples{ending}"
    path = Path(out or usual)
    if path.suffix != ending:
        made = "pictures in a grid" if ending == PICTURES else "arrays"
        raise FolderError(
            f"`{path}` does not end in `{ending}`: samples of this run are {made}, so let the file"
            " that `-o` names end so"
        )
    if save and ending == ARRAYS:
        raise FolderError("`--save` keeps pictures, and this run makes arrays: use `-o` alone")
    if save and Path(save).suffix != ARRAYS:
        raise FolderError(
            f"`{save}` does not end in `.npz`: let the file that `--save` names end so"
        )
    place = Path(save) if save else path.with_name(f"{path.stem}-pictures")
    free(path, _drawn, OTHER)
    if ending == PICTURES:
        free(place, _drawn, OTHER) if save else _own_pictures(place)
    return path, place


def _own_pictures(folder: Path) -> None:
    """Refuses a folder whose pictures, which new ones replace, are no samples."""
    if folder.exists() and not folder.is_dir():
        raise FolderError(
            f"`{folder}` is where each picture would lie, and is no folder: give another name"
            " with `-o`"
        )
    if strange := next((old for old in numbered(folder) if not _drawn(old)), None):
        raise FolderError(
            f"`{strange}` is no sample and would be written over: give another name with `-o`"
        )


def _drawn(path: Path) -> bool:
    """Whether a file is one of samples, by what it says of itself; a damaged one is none."""
    with path.open("rb") as data:
        try:
            if path.suffix == ARRAYS:
                return "settings.npy" in ZipFile(data).namelist()
            # `Image.open` refuses pictures as large as grids can be; this reads the header alone
            return MARK in PngImageFile(data).info
        except (BadZipFile, SyntaxError, ValueError, OSError):
            return False
