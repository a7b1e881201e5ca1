"""What a figure looks like when it is drawn, for the tests of figures."""

from matplotlib.text import Text

from lib.plots import style


def drawn_texts(figure):
    """Texts that are drawn, with their boxes in pixels; none is cut off, or below 6 points."""
    drawn, draw = {}, Text.draw

    def note(text, renderer):
        # an axis also keeps labels of ticks beyond its ends, which it does not draw
        if text.get_visible() and text.get_text().strip():
            drawn[text] = text.get_window_extent(renderer)
        draw(text, renderer)

    try:
        Text.draw = note
        with style.context():
            figure.draw_without_rendering()
    finally:
        Text.draw = draw
    edge = figure.bbox.padded(1)
    for text, box in drawn.items():
        inside = edge.x0 <= box.x0 <= box.x1 <= edge.x1 and edge.y0 <= box.y0 <= box.y1 <= edge.y1
        assert inside, f"cut off: {text.get_text()!r}"
        assert text.get_fontsize() >= 6, f"too small: {text.get_text()!r}"
    return drawn


def said(figure):
    """All that a figure says."""
    found = figure.findobj(Text)
    return "\n".join(text.get_text() for text in found if text.get_visible() and text.get_text())


def legend(figure):
    """Entries of the legend of the whole figure."""
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def rows(axes):
    """Names along the y axis."""
    return [text.get_text() for text in axes.get_yticklabels()]
