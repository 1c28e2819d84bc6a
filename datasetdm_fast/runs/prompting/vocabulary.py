"""The phrases of the grammar: how things of a category look, what they do, and where they are."""

from dataclasses import dataclass


def phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split("|"))


@dataclass(frozen=True)
class Category:
    """Phrases that fit all things of one kind; none of them names a class of a known data set."""

    looks: tuple[str, ...]
    states: tuple[str, ...]
    places: tuple[str, ...]
    is_indoors: bool = False


OUTDOOR_LIGHT = phrases(
    "at dawn|at dusk|at night|at noon|at sunset|just before sunrise|in the late afternoon|in soft morning light|"
    "in golden evening light|under harsh midday light|in deep shade|lit from behind|in flat winter light|by moonlight"
)
WEATHER = phrases(
    "in light rain|in heavy rain|in thick fog|in falling snow|in a haze|under a clear blue expanse overhead|"
    "under low grey clouds|under scattered clouds|on a windy day|after a storm|on a hot summer day|on a frosty morning|"
    "on a mild spring day|on an overcast autumn day"
)
INDOOR_LIGHT = phrases(
    "in daylight from a window|under a warm ceiling light|in dim light|by candlelight|under neon tubes|"
    "in soft morning light|in low evening light|under a single bright lamp|in even studio light|with long shadows|"
    "against bright backlight|in the glow of a fireplace"
)
VIEWS = phrases(
    "a photo of|a close-up photo of|a wide shot of|a candid photo of|a snapshot of|a sharp photograph of|"
    "a documentary photo of|a grainy photo of|a high-resolution photo of|an amateur photo of|a magazine photo of|"
    "a film photograph of"
)
VIEWPOINTS = phrases(
    "seen from above|seen from below|seen from the side|seen from behind|seen from far away|seen from close by|"
    "at eye level|from a low angle|from a high angle|filling most of the frame|small in the frame|off to the left|"
    "off to the right|partly hidden|in the middle of the frame|in the foreground|in the background"
)
NUMBERS = ("two", "three", "four", "several", "a few", "a pair of", "a group of")

ANIMAL = Category(
    phrases(
        "young|old|large|small|brown|white|black|grey|spotted|muddy|wet|sleepy|alert|thin|well-fed|shy|curious|dusty"
    ),
    phrases(
        "resting|walking slowly|standing still|looking back|looking into the camera|drinking|eating|lying down|running|"
        "stretching|shaking off water|sleeping|sniffing the ground|turning around|waiting|playing"
    ),
    phrases(
        "in a meadow|on a dirt path|beside a stream|at the edge of a forest|on a hillside|in tall grass|in a farmyard|"
        "near a wooden gate|on a sandy bank|in a clearing|among rocks|on a gravel track|in a valley|by a lake|"
        "in an open field|beneath old oaks"
    ),
)
PET = Category(
    ANIMAL.looks + phrases("fluffy|short-haired|long-haired|ginger|cream-coloured|striped"),
    phrases(
        "sleeping|stretching|yawning|playing|sitting upright|lying on its side|looking into the camera|waiting|"
        "watching something|rolling over|licking a paw|walking past|jumping|hiding|peeking out|begging for food"
    ),
    phrases(
        "on a rug|on a wooden floor|on a windowsill|in a garden|on a porch|in a living room|in a hallway|on a doorstep|"
        "on a lawn|in a backyard|on a blanket|beside a fireplace|on a staircase|on a beach|in a park|in fallen leaves"
    ),
)
WILD = Category(
    ANIMAL.looks,
    ANIMAL.states,
    phrases(
        "on a savannah|at a water hole|in a nature reserve|near acacia trees|in dry grass|in a river|on a rocky slope|"
        "in a dusty plain|at the edge of a forest|in a zoo enclosure|in tall grass|beside a mud pool|on a gravel road|"
        "in a clearing|in a valley|beneath a cliff"
    ),
)
BIRD = Category(
    phrases("small|large|colourful|grey|white|black|ruffled|bright|young|wet|speckled|long-necked|plump|lone"),
    phrases(
        "perched|taking off|landing|in flight|preening|drinking|singing|feeding|spreading wings|gliding|floating|"
        "looking around|hopping|calling|resting|wading"
    ),
    phrases(
        "on a branch|on a roof|on a rail|by a pond|on a beach|over a lake|in a garden|on a stone|among reeds|"
        "on a wooden post|in a hedge|at the shore|over the waves|on a snowy lawn|in a marsh|on a chimney"
    ),
)
ROAD = Category(
    phrases("red|blue|white|black|silver|yellow|green|old|new|rusty|dusty|vintage|shiny|dented|wet|small|large"),
    phrases(
        "parked|waiting|turning|driving past|standing alone|stopped|covered in dust|covered in snow|being washed|"
        "abandoned|in motion|with open doors|with lights on|being repaired|ready to leave|stuck in mud"
    ),
    phrases(
        "on a city street|on a country road|in a narrow alley|in front of a house|near a market|on a bridge|by the sea|"
        "on a mountain pass|in a courtyard|at a crossing|beside a field|in a village|in a tunnel|outside a factory|"
        "on a gravel drive|in an empty lot|beside a river"
    ),
)
TWO_WHEELS = Category(
    ROAD.looks,
    phrases(
        "leaning|parked|locked|lying on its side|waiting|standing alone|covered in dust|covered in snow|being repaired|"
        "abandoned|ready to leave|stuck in mud|rusting|freshly painted|upside down|with a basket"
    ),
    ROAD.places + phrases("against a brick facade|in a shed|under an awning"),
)
RAIL = Category(
    ROAD.looks,
    phrases(
        "arriving|leaving|standing still|passing|crossing a viaduct|waiting|rounding a curve|under steam|in motion|"
        "covered in snow|being loaded|out of service|with lights on|empty|crowded|slowing down"
    ),
    phrases(
        "at a platform|in a mountain valley|beside a lake|in the city centre|in a depot|near a tunnel|over a river|"
        "through wheat fields|along the coast|in an industrial area|in a snowy landscape|under a glass roof|"
        "at a level crossing|between old houses|in a forest|through the suburbs"
    ),
)
AIR = Category(
    ROAD.looks,
    phrases(
        "taking off|landing|taxiing|parked|climbing|banking|flying low|waiting|being refuelled|circling|cruising|"
        "on final approach|on display|in formation|after touchdown|leaving a trail"
    ),
    phrases(
        "on a runway|above the clouds|over a city|over the sea|at a gate|in a hangar|over mountains|on a grass strip|"
        "over a desert|above a stadium|at an air show|over fields|near a control tower|over a harbour|on wet tarmac|"
        "above a forest"
    ),
)
WATER = Category(
    phrases("red|blue|white|green|wooden|old|new|weathered|small|large|narrow|colourful|freshly painted|half-sunken"),
    phrases(
        "at anchor|drifting|moored|setting out|coming back|pulled ashore|turning|passing|listing|being unloaded|empty|"
        "crowded|tied to a post|under repair|racing|gliding"
    ),
    phrases(
        "in a harbour|on a calm lake|on a wide river|off a rocky coast|in a canal|near a lighthouse|on a sandy beach|"
        "in a bay|beneath a bridge|in rough water|beside a jetty|in a fjord|in a lagoon|among reeds|in a marina|"
        "on the open sea"
    ),
)
PERSON = Category(
    phrases("young|old|tall|smiling|tired|serious|laughing|barefoot|elegant|casually dressed|sunburnt|wet|focused"),
    phrases(
        "walking|standing|sitting|waving|reading|talking|laughing|waiting|stretching|dancing|climbing|kneeling|"
        "looking away|pointing|carrying a basket|leaning forward|jumping|running|stooping|folding both arms"
    ),
    phrases(
        "in a park|on a city square|on a beach|in a workshop|in a kitchen|at a market|on a mountain trail|in a library|"
        "on a stage|in a garden|on a rooftop|on a bridge|in a classroom|at a harbour|in a cafe|in a field|in a gym|"
        "on a staircase|in an office"
    ),
)
STREET_THING = Category(
    phrases("red|yellow|green|old|new|rusty|weathered|bent|freshly painted|snow-covered|wet|leaning|tall|faded"),
    phrases(
        "standing alone|covered in stickers|half hidden|in the sun|in the shade|half buried in snow|dripping|"
        "overgrown|under repair|out of use|beside a puddle|wrapped in tape|beside fallen leaves|in bright paint"
    ),
    phrases(
        "on a street corner|in a quiet village|in the city centre|beside a park|outside a school|in an old town|"
        "near a market|by the sea|at a crossing|along an avenue|on a country road|beside a brick facade|"
        "in the suburbs|near a harbour|in front of a cafe|on a hill"
    ),
)
CARRIED = Category(
    phrases("red|blue|black|brown|leather|canvas|striped|worn|new|open|small|large|vintage|wet|colourful|plain"),
    phrases(
        "lying|left behind|hanging|standing|half open|on display|packed|forgotten|neatly placed|wet from rain|"
        "leaning|tipped over|in a row|covered in dust"
    ),
    phrases(
        "on a wooden floor|on a platform|in a shop window|on a doorstep|on a hook|in a hallway|on a beach|on a lawn|"
        "in a locker room|beside a door|on a marble floor|on a stone step|in an attic|at an airport|on a shelf|"
        "in a hotel room"
    ),
)
SPORT = Category(
    phrases("red|blue|yellow|white|worn|new|wooden|wet|muddy|colourful|scratched|old|shiny|striped"),
    phrases(
        "lying|leaning|waiting|in use|in mid-air|half buried|left behind|on display|in a row|drying|ready for a game|"
        "thrown down|covered in sand|covered in snow"
    ),
    phrases(
        "on a beach|on a lawn|in a park|on a sports field|on a gym floor|on a snowy slope|in a garage|by a lake|"
        "on a wooden deck|on a playground|in a locker room|on concrete steps|on wet sand|in a backyard|on a court|"
        "beside a net"
    ),
)
TABLEWARE = Category(
    phrases("blue|white|green|glass|wooden|silver|ceramic|plain|chipped|clean|empty|old|colourful|small|large|antique"),
    phrases(
        "standing|lying|stacked|drying|half full|set out|waiting|on display|in a row|turned over|freshly washed|"
        "casting a shadow|catching the light|in use"
    ),
    phrases(
        "on a wooden counter|on a linen cloth|on a marble worktop|on a tray|in a cupboard|on a windowsill|on a shelf|"
        "in a cafe|at a picnic|in a restaurant|on a stone slab|beside a stack of plates|in a drawer|on a balcony|"
        "on a garden terrace|on a bar"
    ),
    is_indoors=True,
)
FOOD = Category(
    phrases("fresh|ripe|half-eaten|sliced|whole|small|large|homemade|glazed|juicy|green|red|yellow|organic|warm|cold"),
    phrases(
        "on display|cut open|piled up|ready to eat|being prepared|arranged in a circle|served|wrapped in paper|"
        "dusted with flour|freshly made|half-finished|steaming|drizzled with sauce|left over"
    ),
    phrases(
        "on a plate|on a wooden board|in a basket|at a market stall|on a kitchen counter|on a tray|in a lunch box|"
        "on a linen cloth|at a picnic|in a bakery window|on a marble worktop|in a paper bag|on a grill|in a pan|"
        "in a glass dish|on a napkin"
    ),
    is_indoors=True,
)
FURNITURE = Category(
    phrases("wooden|old|modern|white|green|blue|leather|worn|elegant|rustic|small|large|antique|painted|plain|cosy"),
    phrases(
        "standing alone|covered with a blanket|by itself|pushed against the side|in the corner|freshly cleaned|"
        "half in shadow|unused|covered in dust|decorated|in the middle|beside a window|under a skylight|waiting"
    ),
    phrases(
        "in a living room|in a loft|in a hotel lobby|in a cafe|in a farmhouse|in an attic|in a studio|in a library|"
        "on a veranda|in a small flat|in a showroom|in a waiting room|in an old villa|in a cabin|in a hall|"
        "in a student room"
    ),
    is_indoors=True,
)
DEVICE = Category(
    phrases("black|white|silver|old|new|dusty|modern|broken|small|large|red|grey|vintage|scratched|shiny|cheap"),
    phrases(
        "switched off|switched on|unplugged|in use|on standby|half open|covered in dust|being cleaned|on display|"
        "waiting|taken apart|gathering dust|freshly unpacked|humming quietly"
    ),
    phrases(
        "in a kitchen|on a desk|in an office|in a living room|on a shelf|in a shop|in a small flat|in a workshop|"
        "on a wooden counter|in a hotel room|in a classroom|in a student room|on a workbench|in a studio|"
        "in a laboratory|in a cabin"
    ),
    is_indoors=True,
)
INDOOR = Category(
    phrases("old|new|red|blue|white|small|large|colourful|worn|antique|plain|wooden|golden|faded|clean|delicate"),
    phrases(
        "standing|lying|leaning|by itself|half in shadow|on display|forgotten|in a row|freshly cleaned|waiting|"
        "covered in dust|neatly placed|casting a shadow|turned away"
    ),
    phrases(
        "on a shelf|on a desk|on a windowsill|in a bedroom|in a bathroom|in a hallway|in a studio|in a shop window|"
        "on a wooden floor|in a nursery|on a mantelpiece|in a library|on a chest of drawers|in a hotel room|"
        "at a flea market|in a waiting room"
    ),
    is_indoors=True,
)
CLOTHING = Category(
    phrases("red|blue|black|white|green|striped|plain|loose|fitted|vintage|colourful|elegant|casual|woollen|cotton"),
    phrases(
        "worn by a model|worn at a fashion show|worn on a city walk|worn in a studio|worn outdoors|in full view|"
        "worn with confidence|worn in layers|worn for a catalogue|worn at a party|worn on a runway|worn at home|"
        "worn at the office|worn on holiday"
    ),
    phrases(
        "against a plain backdrop|on a city square|in a studio|on a rooftop|in a park|in front of a shop window|"
        "on a beach|in a loft|at a garden party|in a hotel lobby|on a bridge|in an old town|beside a brick facade|"
        "in a gallery|on a staircase|in a field"
    ),
)
SCENERY = Category(
    phrases("wide|narrow|old|modern|busy|empty|quiet|wet|dusty|sunlit|snow-covered|grey|long|winding|crowded|shaded"),
    phrases(
        "in the morning rush|on a Sunday|after rain|during roadworks|in the shade|in bright sun|at a crossing|"
        "in a residential area|with long shadows|covered in leaves|before the shops open|at closing time|"
        "reflecting the light|fading into the distance"
    ),
    phrases(
        "in a German town|in the city centre|in the suburbs|near a market|beside a park|outside a school|"
        "in an old town|by a river|near a station|at a roundabout|on a hill|near a harbour|in an industrial area|"
        "near a square|in a business district|at the edge of town"
    ),
)
THING = Category(
    INDOOR.looks,
    INDOOR.states,
    INDOOR.places
    + phrases("in a garden|on a lawn|on a beach|on a porch|in a backyard|on a stone step|at a market stall"),
)
ROOM = Category(
    phrases("bright|dark|tidy|cluttered|modern|old-fashioned|small|spacious|cosy|empty|rustic|elegant|narrow|sunny"),
    phrases(
        "with white plaster|with wooden floorboards|with a tiled floor|with large windows|with a low ceiling|"
        "with open shelves|with framed pictures|with a patterned carpet|with boxes in the corner|with sloping sides|"
        "with curtains half drawn|with a skylight|with exposed beams|with bare brickwork"
    ),
    phrases(
        "in a city flat|in a farmhouse|in a student residence|in an old villa|in a new building|in a cabin|in a hotel|"
        "in a terraced house|in a loft|in a suburb|in a country house|in a town house|in an attic|in a basement"
    ),
    is_indoors=True,
)

# Class names as they are said -> their category; classes not listed are things.
CATEGORIES = {
    **dict.fromkeys(("cat", "dog"), PET),
    **dict.fromkeys(("horse", "sheep", "cow"), ANIMAL),
    **dict.fromkeys(("elephant", "bear", "zebra", "giraffe"), WILD),
    "bird": BIRD,
    **dict.fromkeys(("car", "bus", "truck"), ROAD),
    **dict.fromkeys(("bicycle", "motorcycle", "motorbike"), TWO_WHEELS),
    "train": RAIL,
    **dict.fromkeys(("airplane", "aeroplane"), AIR),
    "boat": WATER,
    **dict.fromkeys(("person", "rider"), PERSON),
    **dict.fromkeys(
        phrases("traffic light|fire hydrant|stop sign|parking meter|bench|traffic sign|pole|fence"), STREET_THING
    ),
    **dict.fromkeys(phrases("backpack|umbrella|handbag|tie|suitcase"), CARRIED),
    **dict.fromkeys(
        phrases(
            "frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket"
        ),
        SPORT,
    ),
    **dict.fromkeys(phrases("bottle|wine glass|cup|fork|knife|spoon|bowl"), TABLEWARE),
    **dict.fromkeys(phrases("banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake"), FOOD),
    **dict.fromkeys(phrases("chair|couch|sofa|potted plant|bed|dining table|toilet"), FURNITURE),
    **dict.fromkeys(
        phrases(
            "television|laptop|computer mouse|remote control|keyboard|cell phone|microwave|oven|toaster|sink|"
            "refrigerator"
        ),
        DEVICE,
    ),
    **dict.fromkeys(phrases("book|clock|vase|scissors|teddy bear|hair dryer|toothbrush"), INDOOR),
    **dict.fromkeys(phrases("road|sidewalk|building|wall|vegetation|terrain|sky"), SCENERY),
    **dict.fromkeys(
        phrases(
            "top|jacket|skirt|dress|pants|leggings|hat|glasses|scarf|belt|shoes|bag|hair|face|skin|bracelet|socks|gloves|"
            "necklace|romper|earrings"
        ),
        CLOTHING,
    ),
}

# Words that take no article and no number, or that name many at once.
WITHOUT_ARTICLE = frozenset(
    phrases(
        "skis|scissors|broccoli|cattle|luggage|baggage|pants|leggings|glasses|shoes|socks|gloves|earrings|hair|skin|"
        "sky|vegetation|terrain|trousers|jeans|shorts|slacks|chinos|sweatpants|tights|yoga pants|eyeglasses|sunglasses|"
        "spectacles|footwear|headwear|neckwear|outerwear|high heels|heels|trainers|slippers|flip-flops|loafers|"
        "stockings|mittens|overalls|rompers|grass|soil|sand|sheep|disc golf"
    )
)
# Words that mean a class in a sentence but are no kind of it to ask for.
NO_KIND = frozenset(
    phrases(
        "human|adult|crowd|couple|family|friend|somebody|someone|brother|sister|son|daughter|mother|father|kid|infant|"
        "baggage|canine|feline|disc golf|pick-up|glass of wine|plant in a pot|pair of skis|pair of scissors|ball|table|"
        "trainers|heels|outer|neckwear|headwear|footwear|eyeglass|glove|sock|earring|shoe|cycle|cook|guy|mobile|cab|"
        "rider|driver|passenger|player|clutch|bun|cap|fir|pine|spruce|block|box|pup|kitty|ski|teddy|"
        "potted|tv shows a|tv shows the|tv shows an|swings his bat|swings her bat|swings the bat|swings a bat|"
        "swinging a bat|swinging his bat|swinging her bat|swinging the bat|cow boy|sheep dog|bird dog|motor cycle|"
        "cactus in a pot|fern in a pot|family of three|family of four|family of five|family of people|pair of birds|"
        "family of ducks|family of swans|family of geese|family of bears|family of elephants|glass of champagne|"
        "glass of red wine|glass of white wine|parent|sibling|uncle|aunt|husband|wife|mum|mom|dad|grandchild|"
        "grandparent|lad|youth|boxer|monitor|planter|basin|visitor|customer|bystander|quail|mitt|"
        "orchid in a pot|flower in a pot|flowers in pots|plants in pots|herbs in pots|warrior"
    )
)
ROOMS = phrases(
    "bedroom|kitchen|living room|bathroom|dining room|home office|office|classroom|bookstore|library|study|basement|"
    "playroom|laundry room|furniture store|cafe|lobby|corridor|student lounge|computer lab"
)
STREETS = phrases(
    "city street|residential street|country road|motorway|narrow lane|main road|town square|road through a village|"
    "street with parked cars|tree-lined avenue|street under a bridge|road through a forest|street in an old town"
)
