"""What a figure looks like when it is drawn, for the tests of figures."""

from matplotlib.text import Text

from lib.plots import style


def drawn_texts(figure, monkeypatch):
    """Texts that are drawn, each with its box in pixels; none may be cut off by the figure's edge
    or be smaller than 5.5 points.
    """
    drawn, draw = {}, Text.draw

    def note(text, renderer):
        if (
            text.get_visible() and text.get_text().strip()
        ):  # an axis also keeps labels of ticks beyond its ends, which it does not draw
            drawn[text] = text.get_window_extent(renderer)
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", note)
    with style.context():
        figure.draw_without_rendering()
    assert drawn
    frame = figure.bbox.padded(1)
    for text, box in drawn.items():
        inside = (
            frame.x0 <= box.x0 <= box.x1 <= frame.x1 and frame.y0 <= box.y0 <= box.y1 <= frame.y1
        )
        assert inside, f"cut off: {text.get_text()!r}"
        assert text.get_fontsize() >= 5.5, f"too small: {text.get_text()!r}"
    return drawn
