"""Plain prose that has nothing to do with any picture, to see what steering does to language."""

PARAGRAPHS = (
    "The library opens at nine in the morning and closes at six in the evening, except on Fridays, "
    "when it stays open until eight. Visitors may borrow up to ten items at a time. Anyone who "
    "returns something late pays a small fee for every day, which goes towards new books.",
    "Bread needs only flour, water, salt and yeast. Mix them until no dry flour is left, then let "
    "the dough rest under a cloth for several hours. It will slowly double in size. Shape it "
    "gently, let it rise once more, and bake it in a very hot oven until the crust is dark brown.",
    "In the spring the river carries water from the melting snow down to the plain. The farmers "
    "there have built low walls of earth to protect their fields. When the water falls again in "
    "June, it leaves behind a thin layer of fine mud, and the soil is richer than it was before.",
    "She had lived in the town for thirty years before she learned how it got its name. An old map "
    "in the museum showed a bridge where the school is now, and beside it a single house. The man "
    "who owned the house had collected the toll, and people had come to call the place after him.",
    "Sound travels faster in water than in air, and faster still in steel. This is why someone who "
    "puts an ear to the rail can hear a train long before it comes into view. The sound that has "
    "gone through the metal arrives first, and the one that has gone through the air comes later.",
    "The committee met twice last month to discuss the budget for the coming year. Most of the "
    "members agreed that the roof has to be repaired before the winter. They did not agree on how "
    "to pay for it, and decided to ask three companies for an offer before they meet again.",
)
"""Six paragraphs of about sixty tokens, plain ASCII, written for this benchmark."""
