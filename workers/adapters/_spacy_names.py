"""Word lists for the rules of ``_spacy_rules``: common, unambiguous names, not a gazetteer."""

from __future__ import annotations

from typing import Final

__all__ = ["GIVEN_NAMES", "ORGANISATIONS", "PLACES", "SUFFIXES", "TITLES"]


def _lines(text: str) -> tuple[str, ...]:
    """Comma-separated entries."""
    return tuple(entry for part in text.split(",") if (entry := " ".join(part.split())))


#: Before a capitalised name.
TITLES: Final = _lines(
    "Mr, Mr., Mrs, Mrs., Ms, Ms., Miss, Mx, Dr, Dr., Prof, Prof., Professor, Sir, Lady, Lord, Madam, President, "
    "Senator, Sen., Congressman, Congresswoman, Governor, Gov., Chancellor, Pope, Judge, Captain, Capt., Sgt., "
    "Rev., Herr, Frau, Monsieur, Madame, Señor, Señora"
)

#: Before another capitalised word.
GIVEN_NAMES: Final = _lines(
    "James, John, Robert, Michael, William, David, Richard, Joseph, Thomas, Charles, Christopher, Daniel, Matthew, "
    "Anthony, Steven, Paul, Andrew, Joshua, Kenneth, Kevin, Brian, George, Edward, Ronald, Timothy, Jason, Jeffrey, "
    "Ryan, Jacob, Gary, Nicholas, Eric, Jonathan, Stephen, Larry, Justin, Scott, Brandon, Benjamin, Samuel, "
    "Gregory, Patrick, Alexander, Jack, Dennis, Peter, Henry, Adam, Albert, Isaac, Simon, Martin, Oliver, Harry, "
    "Leo, Oscar, Barack, Donald, Joe, Bill, Steve, Tim, Elon, Boris, Tony, Nelson, Mary, Patricia, Jennifer, Linda, "
    "Elizabeth, Barbara, Susan, Jessica, Sarah, Karen, Lisa, Nancy, Betty, Margaret, Sandra, Ashley, Kimberly, "
    "Emily, Donna, Michelle, Carol, Amanda, Melissa, Deborah, Stephanie, Rebecca, Laura, Helen, Amy, Angela, Anna, "
    "Ruth, Nicole, Katherine, Catherine, Christine, Emma, Julia, Maria, Marie, Diana, Sophie, Sophia, Olivia, "
    "Alice, Ada, Theresa, Hillary, Kamala, Ursula, Greta, Hans, Jürgen, Klaus, Wolfgang, Friedrich, Heinrich, Jean, "
    "Pierre, François, Emmanuel, Jacques, Claude, Carlos, José, Juan, Luis, Miguel, Pedro, Pablo, Fernando, "
    "Giovanni, Marco, Giuseppe, Mohammed, Muhammad, Ahmed, Ali, Omar, Fatima, Aisha, Vladimir, Ivan, Dmitri, "
    "Sergei, Olga, Natasha, Yuki, Hiroshi, Akira, Wei, Li, Xi, Raj, Priya, Narendra, Indira, Mahatma"
)

#: After one or more capitalised words.
SUFFIXES: Final = _lines(
    "Inc, Inc., Incorporated, Corp, Corp., Corporation, Ltd, Ltd., Limited, LLC, LLP, PLC, Plc, plc, Co., Company, "
    "Companies, GmbH, AG, KG, KGaA, SE, SA, S.A., SAS, SARL, S.p.A., SpA, NV, N.V., BV, B.V., Oy, Oyj, AB, ASA, "
    "A/S, ApS, Pty, Group, Holdings, Holding, Bank, Partners, Foundation, Institute, University, College, "
    "Association, Airlines, Airways, Motors, Industries, Technologies, Laboratories, Pharmaceuticals, Records, "
    "Studios, Times"
)

ORGANISATIONS: Final = _lines(
    "United Nations, UN, European Union, EU, European Commission, European Central Bank, ECB, NATO, UNESCO, UNICEF, "
    "World Health Organization, World Bank, IMF, International Monetary Fund, OECD, OPEC, World Trade Organization, "
    "WTO, NASA, ESA, CERN, FBI, CIA, FDA, IRS, BBC, CNN, Reuters, Bloomberg, Associated Press, Congress, Senate, "
    "White House, Federal Reserve, Supreme Court, Red Cross, Greenpeace, Amnesty International, Google, Alphabet, "
    "Microsoft, Facebook, Netflix, IBM, Intel, Nvidia, Tesla, Samsung, Sony, Toyota, Honda, Volkswagen, BMW, "
    "Siemens, SAP, Airbus, Boeing, Nestlé, Unilever, Pfizer, Novartis, Bayer, Spotify, Twitter, YouTube, OpenAI, "
    "PayPal, Uber, Airbnb, Walmart, Starbucks, McDonald's, Goldman Sachs, JPMorgan, HSBC, Deutsche Bank, Bank of "
    "America, Wall Street Journal, New York Times, Financial Times, Harvard, MIT, Stanford"
)

#: Countries, large cities, states.
PLACES: Final = _lines(
    "Afghanistan, Albania, Algeria, Andorra, Angola, Argentina, Armenia, Australia, Austria, Azerbaijan, Bahamas, "
    "Bahrain, Bangladesh, Barbados, Belarus, Belgium, Belize, Benin, Bhutan, Bolivia, Bosnia and Herzegovina, "
    "Botswana, Brazil, Brunei, Bulgaria, Burkina Faso, Burundi, Cambodia, Cameroon, Canada, Cape Verde, Chad, "
    "Chile, China, Colombia, Comoros, Congo, Costa Rica, Croatia, Cuba, Cyprus, Czechia, Czech Republic, Denmark, "
    "Djibouti, Dominican Republic, Ecuador, Egypt, El Salvador, Eritrea, Estonia, Eswatini, Ethiopia, Fiji, "
    "Finland, France, Gabon, Gambia, Georgia, Germany, Ghana, Greece, Grenada, Guatemala, Guinea, Guyana, Haiti, "
    "Honduras, Hungary, Iceland, India, Indonesia, Iran, Iraq, Ireland, Israel, Italy, Ivory Coast, Jamaica, Japan, "
    "Jordan, Kazakhstan, Kenya, Kosovo, Kuwait, Kyrgyzstan, Laos, Latvia, Lebanon, Lesotho, Liberia, Libya, "
    "Liechtenstein, Lithuania, Luxembourg, Madagascar, Malawi, Malaysia, Maldives, Mali, Malta, Mauritania, "
    "Mauritius, Mexico, Moldova, Monaco, Mongolia, Montenegro, Morocco, Mozambique, Myanmar, Namibia, Nepal, "
    "Netherlands, New Zealand, Nicaragua, Niger, Nigeria, North Korea, North Macedonia, Norway, Oman, Pakistan, "
    "Palestine, Panama, Papua New Guinea, Paraguay, Peru, Philippines, Poland, Portugal, Qatar, Romania, Russia, "
    "Rwanda, Saudi Arabia, Senegal, Serbia, Seychelles, Sierra Leone, Singapore, Slovakia, Slovenia, Somalia, South "
    "Africa, South Korea, South Sudan, Spain, Sri Lanka, Sudan, Suriname, Sweden, Switzerland, Syria, Taiwan, "
    "Tajikistan, Tanzania, Thailand, Togo, Tunisia, Turkey, Turkmenistan, Uganda, Ukraine, United Arab Emirates, "
    "UAE, United Kingdom, UK, U.K., Great Britain, Britain, England, Scotland, Wales, Northern Ireland, United "
    "States, United States of America, US, U.S., USA, U.S.A., America, Uruguay, Uzbekistan, Vatican, Venezuela, "
    "Vietnam, Yemen, Zambia, Zimbabwe, Amsterdam, Athens, Atlanta, Auckland, Baghdad, Baltimore, Bangkok, "
    "Barcelona, Basel, Beijing, Beirut, Belgrade, Berlin, Bern, Birmingham, Bogotá, Boston, Bratislava, Brisbane, "
    "Brussels, Bucharest, Budapest, Buenos Aires, Cairo, Calgary, Cambridge, Cape Town, Caracas, Casablanca, "
    "Chicago, Cologne, Copenhagen, Dallas, Damascus, Delhi, Denver, Detroit, Dhaka, Dubai, Dublin, Düsseldorf, "
    "Edinburgh, Florence, Frankfurt, Geneva, Glasgow, Hamburg, Hanoi, Helsinki, Hong Kong, Honolulu, Houston, "
    "Istanbul, Jakarta, Jerusalem, Johannesburg, Karachi, Kolkata, Kuala Lumpur, Kyiv, Lagos, Las Vegas, Leipzig, "
    "Lima, Lisbon, Liverpool, Ljubljana, London, Los Angeles, Lyon, Madrid, Manchester, Manila, Marseille, "
    "Melbourne, Mexico City, Miami, Milan, Minneapolis, Montreal, Moscow, Mumbai, Munich, Nairobi, Naples, New "
    "Delhi, New Orleans, New York, New York City, Nuremberg, Osaka, Oslo, Ottawa, Oxford, Paris, Philadelphia, "
    "Pittsburgh, Prague, Riga, Rio de Janeiro, Riyadh, Rome, Rotterdam, Salzburg, San Diego, San Francisco, "
    "Santiago, São Paulo, Seattle, Seoul, Seville, Shanghai, Shenzhen, Sofia, Stockholm, Strasbourg, Stuttgart, "
    "Sydney, Taipei, Tallinn, Tehran, Tel Aviv, Tokyo, Toronto, Turin, Valencia, Vancouver, Venice, Vienna, "
    "Vilnius, Warsaw, Washington, Washington D.C., Zagreb, Zurich, Zürich, Alaska, Arizona, California, Colorado, "
    "Florida, Hawaii, Illinois, Massachusetts, Michigan, Minnesota, Nevada, New Jersey, New Mexico, North Carolina, "
    "Ohio, Oregon, Pennsylvania, South Carolina, Texas, Virginia, Bavaria, Catalonia, Ontario, Quebec, Queensland"
)
