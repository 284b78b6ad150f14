"""Other names for the things that icons draw, for captions that say them another way.

Each is a common word or two, and means one of the first thousand concepts alone. Some are held out (`scenes.py`), so that words
that a model was never taught can be tried.
"""

_NAMES = """
glasses: eyeglasses; eggplant: aubergine; saxophone: sax; doughnut: donut; snail: escargot; television: tv; seedling: sprout;
melon: cantaloupe; airplane: jet; luggage: suitcase; rooster: cockerel; firecracker: dynamite; turtle: tortoise;
cactus: succulent; orangutan: ape; mosque: masjid; sailboat: yacht; bug: insect; headphone: earphones; rock: boulder;
laptop: notebook computer; sled: sleigh; camera: photo camera; snake: serpent; metro: subway; ledger: account book;
soccer ball: football; package: parcel; amphora: jug; water pistol: squirt gun; pen: ballpoint; wood: log; axe: hatchet;
pancakes: hotcakes; dumpling: potsticker; pill: tablet; honeybee: bee; helicopter: copter; mushroom: toadstool; hut: cabin;
rugby football: rugby ball; custard: pudding; video game: game controller; accordion: squeezebox; sauropod: dinosaur;
videocassette: vhs tape; postbox: mailbox; hamburger: burger; tornado: whirlwind; game die: dice; cricket: grasshopper;
peanuts: groundnuts; wrapped gift: present; puzzle piece: jigsaw; mirror: looking glass; headstone: gravestone;
cockroach: roach; cyclone: hurricane; necktie: tie; teddy bear: plush bear; blueberries: bilberries; mirror ball: disco ball;
minibus: van; nesting dolls: matryoshka; fishing pole: fishing rod; diving mask: snorkel mask; heart suit: hearts card;
feather: plume; jeans: trousers; running shirt: tank top; automobile: car; hot pepper: chili; baguette bread: baguette;
shrimp: prawn; fire: flame; moose: elk; kitchen knife: cleaver; motorcycle: motorbike; moai: stone statue; squid: calamari;
scarf: shawl; bell pepper: capsicum; bicycle: bike; donkey: mule; abacus: counting frame; parrot: macaw; motorway: highway;
wastebasket: trash can; hot beverage: coffee; horse: stallion; kiwi fruit: kiwi; world map: atlas; ginger root: ginger;
poultry leg: drumstick; wine glass: glass of wine; pea pod: peas; ring buoy: lifebuoy; coat: jacket; french fries: fries;
maracas: shakers; bellhop bell: service bell; wrench: spanner; hourglass done: hourglass; cocktail glass: martini;
socks: stockings; hot dog: frankfurter; ewe: sheep; goat: billy goat; camel: dromedary; tropical drink: cocktail;
llama: alpaca; bullet train: high speed train; gear: cogwheel; steaming bowl: ramen; beer mug: pint; green salad: salad;
rhinoceros: rhino; hippopotamus: hippo; broom: besom; tumbler glass: whiskey; motor boat: motorboat; fortune cookie: cookie;
chipmunk: squirrel; takeout box: chinese takeaway; ringed planet: saturn; bubble tea: boba; toolbox: tool chest;
ferris wheel: big wheel; bucket: pail; bear: grizzly; glowing star: shining star; purse: coin purse; lady beetle: ladybug;
backpack: rucksack; hatching chick: hatchling; barber pole: barber sign; potted plant: houseplant; circus tent: big top;
fire engine: fire truck; musical keyboard: piano; black bird: crow; flying saucer: ufo; mobile phone: smartphone;
spider web: cobweb; police car: patrol car; evergreen tree: pine; high voltage: lightning bolt; spiral shell: conch;
water wave: surf; pickup truck: pickup; articulated lorry: semi truck; adhesive bandage: plaster; motor scooter: moped;
mouse trap: mousetrap; funeral urn: urn; auto rickshaw: tuk tuk; fuel pump: gas pump; carpentry saw: saw;
satellite antenna: dish antenna; spiral notepad: notepad; desktop computer: monitor; balance scale: scales;
light bulb: lamp bulb; floppy disk: diskette; shopping cart: trolley; thong sandal: flip flop; running shoe: sneaker;
flat shoe: slipper; video camera: camcorder; prayer beads: necklace; gem stone: jewel; hair pick: comb; pile of poo: poop;
baby angel: cherub; Santa Claus: father christmas; mage: wizard; pig: hog; frog: toad; rabbit: bunny; ghost: phantom
"""

NAMES: dict[str, str] = dict(pair.strip().split(": ") for pair in _NAMES.replace("\n", " ").split(";"))
