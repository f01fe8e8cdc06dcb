"""Prompts of `bench spec`: passages to copy, and questions of a chat."""

PASSAGES = (
    "The lighthouse at Carrow Point was built in 1868 after three ships were lost in a single winter. Its lamp "
    "burned whale oil, later kerosene, and since 1931 electricity. The keeper's cottage, a low stone house with "
    "two rooms, now holds a small museum. Visitors can climb the 142 steps to the gallery, from where the islands "
    "of the bay can be seen on clear days. The fog signal, a horn driven by compressed air, was silenced in 1987 "
    "and is sounded only once a year, on the first Sunday of June.",
    "The committee met on Tuesday, 4 March, in the town hall. Present were Mr. Abbott, Ms. Chen, Dr. Okafor and "
    "Mrs. Lindqvist. The minutes of the last meeting were approved. Ms. Chen reported that the repair of the "
    "northern bridge will cost 48,500 euros, of which the county pays half. Dr. Okafor asked for a second offer. "
    "It was decided to wait for it until the end of the month. Mrs. Lindqvist presented the programme of the "
    "summer festival, which begins on 12 July with a concert in the park.",
    "To change the filter, switch the machine off and unplug it. Open the lid on the left side and pull the grey "
    "handle towards you until it clicks. Lift the old filter out and let it drip over a bowl. Rinse the holder "
    "with cold water, never with soap. Insert the new filter with the arrow pointing up, push the handle back and "
    "close the lid. Plug the machine in, hold the green button for five seconds, and run two cups of water "
    "through it before you use it again.",
)
COPYING = (
    "Repeat the following text word for word, without any changes:\n\n{}",
    "Copy this text exactly as it is:\n\n{}",
    "Quote the following text in full, and nothing else:\n\n{}",
)
CHAT = (
    "Explain how rain forms.",
    "Write a short story about a dog who learns to swim.",
    "What should I consider when I buy a used car?",
    "Give me five ideas for a birthday party.",
    "Describe the difference between cats and dogs as pets.",
    "How do I prepare for a long hike?",
)
