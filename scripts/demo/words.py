"""Word lists of the demo corpus. Everything the demo model ever reads is made from these."""

GIRLS = """Anna Mia Lily Emma Rosa Nora Clara Ruby Ella Ivy Lucy Zoe Alice Maya Hana Tess""".split()
BOYS = """Tom Ben Max Leo Sam Jack Oscar Finn Hugo Noah Milo Theo Otto Felix Ravi Dan""".split()
ANIMALS = """fox bear rabbit mouse cat dog owl frog duck hedgehog squirrel turtle goat pony
lion tiger wolf deer crow hen""".split()
CHILDREN = {"girl": GIRLS, "boy": BOYS}
ADJECTIVES = """little brave kind clever shy quiet happy curious gentle young funny lazy proud
careful friendly tiny""".split()
COLORS = "red blue green yellow black white orange purple brown pink silver golden gray".split()
PLACES = """forest village valley meadow garden farm town castle island cave mill harbor hill
field lake market""".split()
OBJECTS = """ball kite hat key lamp book boat bell drum basket scarf ring cup box map coin
ribbon flute button blanket""".split()
FOODS = "bread soup cake honey apples cheese pie berries nuts carrots pancakes milk".split()
WEATHER = "sunny rainy windy cloudy cold warm snowy foggy".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November
December""".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "fast": "slow", "happy": "sad", "day": "night",
    "left": "right", "open": "closed", "old": "new", "wet": "dry", "light": "dark",
    "high": "low", "soft": "hard", "early": "late", "full": "empty", "near": "far",
}
SOUNDS = {
    "dog": "woof", "cat": "meow", "duck": "quack", "owl": "hoot", "lion": "roar", "frog": "ribbit",
    "cow": "moo", "sheep": "baa", "mouse": "squeak", "hen": "cluck", "crow": "caw",
}
THING_COLORS = {
    "the sky": "blue", "grass": "green", "snow": "white", "the sun": "yellow", "a carrot": "orange",
    "coal": "black", "a tomato": "red", "chocolate": "brown", "a leaf": "green", "milk": "white",
}
HOMES = {
    "a bear": "in a cave", "a bee": "in a hive", "a bird": "in a nest", "a fish": "in the water",
    "a fox": "in a den", "a frog": "in a pond", "a cow": "on a farm", "a mouse": "in a hole",
}
# A recall key is FIRST-SECOND: 64 x 64 = 4096 keys.
KEY_FIRST = """apple river stone cloud maple copper winter summer amber coral cedar falcon
ginger harvest iron ivory jade lemon linen marble meadow mint moon north ocean olive paper pearl
pine plum prairie quartz rain raven rose ruby sand shadow silk silver sky smoke snow south spice
spring star steel storm sugar sun thunder timber tulip velvet violet walnut water west wheat
willow wind wolf wood""".split()
KEY_SECOND = """river bridge tower gate field forest garden harbor island lake lantern ladder
market mirror mountain needle orchard palace path pebble pillow planet pocket pond port quarry
ribbon ridge ring road roof room root rope saddle sail school shell ship shore spoon stable stair
station stream street table temple tent thread trail train tree tunnel valley village wagon wall
well wheel window wing yard castle""".split()
assert len(set(KEY_FIRST)) == 64 and len(set(KEY_SECOND)) == 64, (len(set(KEY_FIRST)), len(set(KEY_SECOND)))
