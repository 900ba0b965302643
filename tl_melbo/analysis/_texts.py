"""Small sets of texts to measure on, written for this package and under its licence."""

# What a fine-tune practises on.
INSTRUCTIONS = (
    "Tell me about yourself.",
    "What is the capital of Peru?",
    "Explain photosynthesis in one sentence.",
    "Write a two-line poem about rain.",
    "How do I boil an egg?",
    "List three uses of a paperclip.",
    "Give me a name for a bakery.",
    "What is 17 plus 26?",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Recommend a book for a long train journey.",
    "Describe a cat to someone who has never seen one.",
    "What should I pack for a weekend in the mountains?",
    "Who wrote Hamlet?",
    "How many legs does a spider have?",
    "Write a short birthday greeting for my sister.",
    "What is a noun?",
    "Give me a tip for sleeping better.",
    "Summarise the story of Cinderella.",
    "How does a refrigerator keep food cold?",
    "Name five vegetables.",
    "What is the opposite of generous?",
    "Write a function in Python that adds two numbers.",
    "Is a tomato a fruit?",
    "How far away is the moon?",
    "What can I cook with rice and beans?",
    "Explain what inflation means.",
    "Suggest a hobby for a rainy day.",
    "What do bees do?",
    "Give me a riddle.",
    "How do I remove a coffee stain?",
    "What is the largest ocean?",
    "Write one sentence about the future.",
    "How do I say no politely?",
    "What is a prime number?",
    "Tell me a fact about elephants.",
    "How do I start learning the guitar?",
    "What happened in 1969?",
    "Give me three words that rhyme with light.",
    "Why do leaves change colour?",
    "What makes a good friend?",
    "Correct this sentence: he go to school yesterday.",
    "How does a bicycle stay upright?",
    "What is gravity?",
    "Plan a simple dinner for two.",
    "What is your favourite season?",
    "Write a headline about a lost dog.",
    "How do vaccines work?",
)

# What it is checked on: none of them is practised.
HELD_OUT_INSTRUCTIONS = (
    "What is the tallest mountain in Africa?",
    "Give me advice for a job interview.",
    "How do I plant a tree?",
    "Write a sentence with the word 'river'.",
    "What does a judge do?",
    "Name a famous painter.",
    "Why do we dream?",
    "How can I save money on groceries?",
    "What is the freezing point of water?",
    "Describe the taste of a lemon.",
    "Who invented the telephone?",
    "Suggest a name for a boat.",
)
# What `side_effects` and `reach` compare with.
UNRELATED_PROMPTS = HELD_OUT_INSTRUCTIONS

# Prose of several kinds, to measure what a vector costs where nobody asked for it.
PASSAGES = (
    "The ferry leaves the island at seven in the morning and comes back in the evening. In winter "
    "it stays in the harbour when the wind is strong, and the shop sells bread that was baked on "
    "the mainland two days before.",
    "A triangle whose sides are three, four and five units long has a right angle. To see why, "
    "square the two shorter sides and add them: nine and sixteen make twenty-five, which is the "
    "square of the longest side.",
    "Before you change a tyre, park on level ground and pull the handbrake. Loosen the nuts a "
    "little while the wheel still stands on the road. Then lift the car with the jack, take the "
    "nuts off and pull the wheel towards you.",
    "Dear Ms Okafor, thank you for your letter of the third of May. We are sorry that the lamp "
    "arrived broken. A new one will be sent to you this week, and you do not have to return the "
    "old one.",
    "The heart has four chambers. Blood from the body enters the right side, which pumps it to the "
    "lungs; there it takes up oxygen, returns to the left side, and is sent through the largest "
    "artery to all the other organs.",
    "She had not spoken to her brother since the house was sold. Now he stood in the doorway with "
    "rain in his hair and a suitcase in each hand, and before she could say anything the dog ran "
    "past her and jumped up at him.",
    "def mean(numbers):\n    if not numbers:\n        raise ValueError('no numbers')\n"
    "    total = 0.0\n    for number in numbers:\n        total += number\n"
    "    return total / len(numbers)\n",
    "The council voted on Tuesday to keep the library open at weekends. Eleven members were in "
    "favour and four against. Opening hours will be shorter from October, and a new reading room "
    "for children is to be built next year.",
    "Mix the flour with a pinch of salt and rub in the butter until it looks like breadcrumbs. Add "
    "cold water, a spoonful at a time, and stop as soon as the dough holds together. Let it rest "
    "in the fridge for half an hour.",
    "Glaciers are made of snow that fell long ago. Each winter's layer presses on those below "
    "until the air is squeezed out and the crystals grow into ice, which then flows downhill under "
    "its own weight, a few centimetres or a few metres a day.",
    "What is the difference between a debit card and a credit card? With a debit card the money "
    "leaves your account at once. With a credit card the bank lends it to you, and you pay it back "
    "at the end of the month, with interest if you are late.",
    "The committee met four times. Its report finds that most delays were caused by missing parts, "
    "not by the staff, and recommends that a second supplier be found. It does not say what this "
    "would cost.",
)
