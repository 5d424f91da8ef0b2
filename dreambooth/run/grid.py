"""Several images on one sheet, with captions."""

import textwrap

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8


def captioned_grid(rows: list[list[Image.Image]], captions: list[str], headings: list[str]) -> Image.Image:
    """Returns a sheet of images of one size.

    Args:
        rows: the images; no row is longer than the first.
        captions: a text under each row.
        headings: texts over equal groups of columns, such as "before" and "after"; none is no line for them.
    """
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=max(10, width // 10))
    line = font.getbbox("Ag")[3] + 2
    step = width + MARGIN
    sheet_width = MARGIN + step * len(rows[0])
    wrapped = [_wrapped(caption, font, sheet_width - MARGIN) for caption in captions]
    heights = [height + 2 * MARGIN + line * len(text) for text in wrapped]
    top = MARGIN + (line + MARGIN if headings else 0)

    sheet = Image.new("RGB", (sheet_width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, heading in enumerate(headings):
        centre = sheet_width * (number + 0.5) / len(headings)
        draw.text((centre, MARGIN), heading, fill="gray", font=font, anchor="ma")
    for images, text, row_height in zip(rows, wrapped, heights, strict=True):
        for column, image in enumerate(images):
            sheet.paste(image, (MARGIN + step * column, top))
        draw.multiline_text(
            (sheet_width / 2, top + height + MARGIN / 2),
            "\n".join(text),
            fill="black",
            font=font,
            anchor="ma",
            align="center",
        )
        top += row_height
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Returns the lines of a text, none wider than so many pixels."""
    letters = max(1, int(1.8 * width / font.size))
    while letters > 1 and max(map(font.getlength, textwrap.wrap(text, letters)), default=0) > width:
        letters -= 1
    return textwrap.wrap(text, letters) or [""]
